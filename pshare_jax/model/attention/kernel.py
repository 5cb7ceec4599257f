"""Paged attention as a Pallas kernel for GPUs (lowered by Triton): decode steps, prefill chunks and scoring.

A program has a tile of the queries of one row and one kv head, and a split of the keys that they see. Its loops over blocks of
cached and of new keys have as many trips as the row needs, a number known at run time, and start where the sliding window does.
Each split gives a softmax state, and XLA merges them. Prefixes that rows share (`batch.shared`) are read by each row. On CPU the
kernel runs in Pallas's interpret mode, for tests. It has never run on an accelerator.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.mesh import MODEL, REPLICATED, by_rows
from pshare_jax.model.attention.online import Softmax, capped_scores
from pshare_jax.model.attention.paged import PagedAttention, stored_ends, visible_new, visible_old
from pshare_jax.model.kv.pages import LayerPages, by_slot, slots_in
from pshare_jax.model.paged_batch import PagedBatch
from pshare_jax.model.sharding import PAGES_SPEC

# None of these numbers was chosen by measuring.
LEAST = 16
"""The smallest side of a matrix in a product; Triton's sides are powers of two."""
TILE_SUMS = 64 * 128
"""Sums that a program keeps in registers, queries x head size: 64 for each of its threads."""
BLOCK_BYTES = 16 * 1024
"""Bytes of a block of keys."""
PROGRAMS = 1024
"""Keys are split until there are so many programs, several for each multiprocessor."""
SPLIT_TOKENS = 512
"""The least length of a split of the longest context, so that merging costs little."""
WARPS, STAGES = 4, 3
"""Stages: a block's page numbers, its keys and values, and the products run at once for three blocks."""
HEADS_SPEC = PartitionSpec(None, None, MODEL, None)


@functools.cache
def kernel_attention(mesh: Mesh, interpret: bool) -> PagedAttention:
    """The `PagedAttention` of a mesh. With tensor parallelism each device attends with its own heads."""
    tp = mesh.shape[MODEL]

    def attend(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        pages: LayerPages,
        batch: PagedBatch,
        window: int | None,
        scale: float,
        softcap: float | None,
        independent: Bool[Array, ""] | None = None,
    ) -> Float[Array, "B T N H"]:
        K, whole = k.shape[2], REPLICATED
        if K % tp == 0:
            heads = jnp.arange(K // tp)
            specs = (whole, HEADS_SPEC, HEADS_SPEC, HEADS_SPEC, PAGES_SPEC, whole, whole)
        else:
            # Each device has all kv heads, and queries of one.
            heads = jnp.arange(tp) * K // tp
            specs = (PartitionSpec(MODEL), HEADS_SPEC, whole, whole, whole, whole, whole)
        form = functools.partial(_attention, window=window, scale=scale, softcap=softcap, interpret=interpret)
        local = by_rows(form, mesh, (MODEL,) if tp > 1 else (), specs, HEADS_SPEC)
        batch = jax.tree.map(jnp.asarray, batch._replace(shared=None))
        return local(heads.astype(jnp.int32), q, k, v, pages, batch, independent)

    return attend


def _attention(
    heads: Int[Array, "own"],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T all H"],
    v: Float[Array, "B T all H"],
    pages: LayerPages,
    batch: PagedBatch,
    independent: Bool[Array, ""] | None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Attention on one device, of the queries of the kv heads `heads`."""
    B, T, N, H = q.shape
    tiling = Tiling.of(q, len(heads), batch.page_table.shape[1] * pages[0].shape[2])
    kernel = functools.partial(_kernel, tiling, pages[0].shape[2], window, scale, softcap)
    states = (tiling.splits, B, T, N)
    call = pl.pallas_call(
        kernel,
        grid=(B, len(heads), tiling.tiles, tiling.splits),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (states, states, (*states, H))],
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="paged_attention",
    )
    flag = jnp.zeros((1,), jnp.int32) if independent is None else independent.astype(jnp.int32).reshape(1)
    rows = (batch.page_table, batch.context_lens, stored_ends(batch, independent))
    return Softmax(*call(heads, *rows, flag, q, k, v, *map(by_slot, pages))).merged().result().astype(q.dtype)


@dataclass(frozen=True)
class Tiling:
    """How work is divided: `tile` queries, of `groups` heads of each token, and `block` keys make one product, of heads padded to
    `width`.
    """

    groups: int
    width: int
    tile: int
    block: int
    tiles: int
    splits: int

    @classmethod
    def of(cls, q: Float[Array, "B T N H"], num_kv_heads: int, table_tokens: int) -> "Tiling":
        """The tiling for pages that hold up to `table_tokens` of each row."""
        B, T, N, H = q.shape
        queries = T * N // num_kv_heads
        width = max(LEAST, pl.next_power_of_2(H))
        tile = max(LEAST, min(TILE_SUMS // width, pl.next_power_of_2(queries)))
        block = max(LEAST, BLOCK_BYTES // (width * q.dtype.itemsize))
        tiles = pl.cdiv(queries, tile)
        splits = max(1, min(PROGRAMS // (B * num_kv_heads * tiles), table_tokens // SPLIT_TOKENS))
        return cls(N // num_kv_heads, width, tile, block, tiles, splits)


def _kernel(
    tiling: Tiling,
    page_size: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    heads: Any,
    table: Any,
    lengths: Any,
    ends: Any,
    flag: Any,
    q: Any,
    k: Any,
    v: Any,
    stored_k: Any,
    stored_v: Any,
    highest: Any,
    total: Any,
    out: Any,
) -> None:
    """One program. From `heads` on, references to whole arrays: the arguments and results of the call in `_attention`."""
    (_, num_new, _, head_dim), groups = q.shape, tiling.groups
    row, own_head, tile, split = map(pl.program_id, range(4))
    head, length, independent = heads[own_head], lengths[row], flag[0] != 0
    columns = jnp.arange(tiling.width)[None]

    # Queries are in the order (token, group), so that a tile's positions are neighbours.
    indices = tile * tiling.tile + jnp.arange(tiling.tile)
    real = indices < num_new * groups
    tokens, query_heads = indices // groups, own_head * groups + indices % groups
    positions, first, last = length + tokens, jnp.min(tokens), jnp.minimum(jnp.max(tokens), num_new - 1)
    queries = _load(q, (row, tokens[:, None], query_heads[:, None], columns), real, head_dim) * scale
    end = jnp.minimum(ends[row], length + last)

    def add_stored(block: Array, state: Softmax) -> Softmax:
        at = block * tiling.block + jnp.arange(tiling.block)
        stored = at < end
        page = triton.load(table.at[row, at // page_size], mask=stored, other=0)
        slots = slots_in(page, at, page_size)[:, None]
        keys, values = (_load(part, (head, slots, columns), stored, head_dim) for part in (stored_k, stored_v))
        seen = visible_old(positions, at, window, independent) & stored[None]
        return state.add(jnp.where(seen, capped_scores(queries, keys, softcap), -jnp.inf), values)

    def add_new(block: Array, state: Softmax) -> Softmax:
        at = block * tiling.block + jnp.arange(tiling.block)
        new = at < num_new
        keys, values = (_load(part, (row, at[:, None], head, columns), new, head_dim) for part in (k, v))
        seen = visible_new(positions, window, independent, length + at) & new[None]
        return state.add(jnp.where(seen, capped_scores(queries, keys, softcap), -jnp.inf), values)

    state = Softmax.of_nothing((tiling.tile, tiling.width))
    begin, stop = _blocks(length + first, end, window, tiling.block)
    each = pl.cdiv(stop - begin, tiling.splits)
    begin += split * each
    state = jax.lax.fori_loop(begin, jnp.minimum(begin + each, stop), add_stored, state)
    begin, stop = _blocks(first, last + 1, window, tiling.block)
    state = jax.lax.fori_loop(begin, jnp.where(split == tiling.splits - 1, stop, begin), add_new, state)

    at = (split, row, tokens, query_heads)
    triton.store(highest.at[at], state.highest, mask=real)
    triton.store(total.at[at], state.total, mask=real)
    at = (split, row, tokens[:, None], query_heads[:, None], columns)
    triton.store(out.at[at], state.out, mask=real[:, None] & (columns < head_dim))


def _load(part: Any, at: tuple[Any, ...], real: Array, head_dim: int) -> Array:
    """Rows of heads at these indices, of which the last are columns. Rows that are not real are 0: unused slots may hold NaN,
    which a zero weight would not remove.
    """
    return triton.load(part.at[at], mask=real[:, None] & (at[-1] < head_dim), other=0)


def _blocks(first_query: Array, end: Array, window: int | None, block: int) -> tuple[Array, Array]:
    """The blocks (first, stop) of the keys before `end` that queries from the first one on see."""
    begin = 0 if window is None else jnp.maximum(first_query - window + 1, 0)
    stop = pl.cdiv(end, block)
    return jnp.minimum(begin // block, stop), stop
