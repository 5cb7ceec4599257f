"""The device arrays of one KV pool, and the moves of pages in, out and between pools by buckets of few shapes.

Only the thread that owns the pool calls it, except `device_put`, which touches no array of the pool.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.shapes import bucket_of
from pshare_jax.mesh import replicated
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.kv.pages import KVPages, content_shape, device_put_content, empty_pages, page_bytes
from pshare_jax.model.paged_steps import page_moves
from pshare_jax.model.sharding import content_sharding, pages_sharding


class DevicePages:
    """A pool's arrays on `mesh`. Pages are moved in numbers of `move_buckets`, padded with page 0."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, num_pages: int, page_size: int, dtype: str, move_buckets: Sequence[int]
    ):
        self.config, self.mesh = config, mesh
        self.num_pages, self.page_size, self.dtype = num_pages, page_size, dtype
        self.move_buckets = move_buckets
        self.pages: KVPages = ()
        self._moves = page_moves(config, mesh)
        self.reset()

    def run(self, step: Callable[..., tuple[Any, KVPages]], params: Any, tokens: Any, rows: Any) -> Any:
        """Calls `step(params, tokens, rows, pages)`, keeps the pages it returns and gives back its other result."""
        result, self.pages = step(params, tokens, rows, self.pages)
        return result

    def gather(self, ids: Sequence[int]) -> jax.Array:
        """The content of at most the largest bucket of pages, padded to a bucket."""
        return self._moves.gather(self.pages, self._padded(ids))

    def device_put(self, content: Any) -> jax.Array:
        """Content of another pool, or from host memory, on its way to this pool's devices (dispatched)."""
        return device_put_content(content, self.config, self.mesh)

    def scatter(self, ids: Sequence[int], content: jax.Array) -> None:
        """Writes placed content into pages."""
        self.pages = self._moves.scatter(self.pages, self._padded(ids), content)

    def fill(self, ids: Sequence[int]) -> None:
        """NaN into pages."""
        largest = self.move_buckets[-1]
        for start in range(0, len(ids), largest):
            self.pages = self._moves.fill(self.pages, self._padded(ids[start : start + largest]), np.float32(np.nan))

    def empty_tables(self, num_slots: int, table_len: int) -> jax.Array:
        """Page tables `[num_slots, table_len]` of padding."""
        return jax.device_put(np.zeros((num_slots, table_len), np.int32), replicated(self.mesh))

    def put_table(self, tables: jax.Array, slot: int, pages: Sequence[int]) -> jax.Array:
        """The page tables with a new one in the slot; they are donated."""
        table = np.zeros(tables.shape[1], np.int32)
        table[: len(pages)] = pages
        return self._moves.put_table(tables, np.int32(slot), table)

    def reset(self) -> None:
        """New, empty arrays."""
        self.pages = ()
        self.pages = empty_pages(self.config, self.num_pages, self.page_size, self.dtype, self.mesh)

    @property
    def device_page_bytes(self) -> int:
        """Bytes of a page of all layers on each device."""
        kv_heads, *_ = pages_sharding(self.config, self.mesh).shard_shape((self.config.num_kv_heads, 1, 1, 1))
        return page_bytes(self.config, self.page_size, self.dtype) * kv_heads // self.config.num_kv_heads

    @property
    def spec(self) -> Any:
        """Shapes and shardings of the arrays, for compiling ahead of time."""
        shape = (self.config.num_kv_heads, self.num_pages, self.page_size, self.config.head_dim)
        part = jax.ShapeDtypeStruct(shape, self.dtype, sharding=pages_sharding(self.config, self.mesh))
        return tuple((part, part) for _ in self.config.layers)

    def content_spec(self, num_pages: int) -> jax.ShapeDtypeStruct:
        """Shape and sharding of the placed content of `num_pages` pages."""
        shape = content_shape(self.config, num_pages, self.page_size)
        return jax.ShapeDtypeStruct(shape, self.dtype, sharding=content_sharding(self.config, self.mesh))

    @classmethod
    def of(cls, pool: Pool) -> "DevicePages":
        """The arrays of a pool that is on devices (tests have other stores)."""
        assert isinstance(pool.store, cls)
        return pool.store

    def _padded(self, ids: Sequence[int]) -> np.ndarray:
        padded = np.zeros(bucket_of(len(ids), self.move_buckets), np.int32)
        padded[: len(ids)] = ids
        return padded
