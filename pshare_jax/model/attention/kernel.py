"""Paged attention as a Pallas kernel for GPUs (lowered by Triton): decode steps, prefill chunks and scoring.

A program has the queries of one row and one kv head that fit into a tile, and one split of the context that they see; its loop
reads that many blocks of cached keys, a number known at run time. It starts behind what is before the sliding window. A split
gives a softmax state; XLA merges them with that of the new tokens. Prefixes that rows share (`batch.shared`) are read by each
row. On CPU the kernel runs in Pallas's interpret mode, for tests. It has never run on an accelerator.
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
from pshare_jax.model.attention.online import Softmax, by_kv_head, capped_scores, in_token_order, new_tokens
from pshare_jax.model.attention.paged import PagedAttention, positions_of, stored_ends, visible_old
from pshare_jax.model.kv.pages import LayerPages, by_slot, slots_in
from pshare_jax.model.paged_batch import PagedBatch
from pshare_jax.model.sharding import PAGES_SPEC

LEAST = 16
"""The smallest side of a matrix in a product (`tl.dot`); sides are powers of two."""
TILE_SUMS = 64 * 128
"""Sums that a program keeps in registers, queries x head size: 64 for each thread of 4 warps."""
BLOCK_BYTES = 16 * 1024
"""Bytes of a block of keys; two of keys and two of values are in shared memory at a time."""
PROGRAMS = 1024
"""The context is split until there are so many programs, several for each multiprocessor."""
SPLIT_TOKENS = 512
"""Tables have at least this many tokens for each split, so that merging costs little."""
# No number here was measured: choose them anew on a GPU.
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
        # A device has whole kv heads, or all of them and the queries of one.
        divided = K % tp == 0
        heads = jnp.arange(K // tp) if divided else jnp.arange(tp) * K // tp
        form = functools.partial(_attention, window=window, scale=scale, softcap=softcap, interpret=interpret)
        of_kv, of_pages, of_heads = (HEADS_SPEC, PAGES_SPEC, whole) if divided else (whole, whole, PartitionSpec(MODEL))
        specs = (of_heads, HEADS_SPEC, of_kv, of_kv, of_pages, whole, whole)
        local = by_rows(form, mesh, (MODEL,) if tp > 1 else (), specs, HEADS_SPEC)
        batch = jax.tree.map(jnp.asarray, batch._replace(shared=None))
        return local(heads.astype(jnp.int32), q, k, v, pages, batch, independent)

    return attend


def _attention(
    heads: Int[Array, "K"],
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
    """Attention of the queries of the kv heads `heads`, on one device."""
    queries = by_kv_head(q, len(heads), scale)
    own_k, own_v = (part if part.shape[2] == len(heads) else part[:, :, heads] for part in (k, v))
    state = new_tokens(queries, own_k, own_v, positions_of(batch, q.shape[1]), window, softcap, independent)
    table_tokens = batch.page_table.shape[1] * pages[0].shape[2]
    tiling = Tiling.of(queries, q.shape[1], pages[0].shape[2], table_tokens, window, softcap)
    stored = _stored_tokens(tiling, heads, queries, pages, batch, independent, interpret)
    return in_token_order(state.merge(stored), q)


@dataclass(frozen=True)
class Tiling:
    """What a kernel is compiled for. `tile` queries and `block` keys make one product, of heads padded to `width`."""

    num_tokens: int
    num_queries: int
    head_dim: int
    page_size: int
    window: int | None
    softcap: float | None
    width: int
    tile: int
    block: int
    tiles: int
    splits: int

    @classmethod
    def of(
        cls,
        queries: Float[Array, "B K Q H"],
        num_tokens: int,
        page_size: int,
        table_tokens: int,
        window: int | None,
        softcap: float | None,
    ) -> "Tiling":
        """The tiling of queries of `num_tokens` tokens, over pages that hold up to `table_tokens` of each row."""
        B, K, Q, H = queries.shape
        width = max(LEAST, pl.next_power_of_2(H))
        tile = max(LEAST, min(TILE_SUMS // width, pl.next_power_of_2(Q)))
        tiles = pl.cdiv(Q, tile)
        splits = max(1, min(PROGRAMS // (B * K * tiles), table_tokens // SPLIT_TOKENS))
        block = max(LEAST, BLOCK_BYTES // (width * queries.dtype.itemsize))
        return cls(num_tokens, Q, H, page_size, window, softcap, width, tile, block, tiles, splits)


def _stored_tokens(
    tiling: Tiling,
    heads: Int[Array, "K"],
    queries: Float[Array, "B K Q H"],
    pages: LayerPages,
    batch: PagedBatch,
    independent: Bool[Array, ""] | None,
    interpret: bool,
) -> Softmax:
    """The softmaxes `[splits, B, K, Q]` over the cached tokens."""
    B, K, Q, H = queries.shape
    states = (tiling.splits, B, K, Q)
    flag = jnp.zeros((1,), jnp.int32) if independent is None else independent.astype(jnp.int32).reshape(1)
    call = pl.pallas_call(
        functools.partial(_kernel, tiling),
        grid=(B, K, tiling.tiles, tiling.splits),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (states, states, (*states, H))],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )
    ends = stored_ends(batch, independent)
    return Softmax(*call(heads, batch.page_table, batch.context_lens, ends, flag, queries, *map(by_slot, pages)))


def _kernel(
    tiling: Tiling,
    heads: Any,
    table: Any,
    lengths: Any,
    ends: Any,
    flag: Any,
    queries: Any,
    keys: Any,
    values: Any,
    highest: Any,
    total: Any,
    out: Any,
) -> None:
    """One program. All but `tiling` are references to whole arrays: the arguments of `_stored_tokens`, then its results."""
    row, own_head, tile, split = map(pl.program_id, range(4))
    head, independent = heads[own_head], flag[0] != 0
    columns = jnp.arange(tiling.width)[None, :]
    indices = tile * tiling.tile + jnp.arange(tiling.tile)
    positions = lengths[row] + indices % tiling.num_tokens
    q_at = (row, own_head, indices[:, None], columns)
    real = (indices < tiling.num_queries)[:, None] & (columns < tiling.head_dim)
    q = triton.load(queries.at[q_at], mask=real, other=0)

    def add(block: Array, state: Softmax) -> Softmax:
        at = block * tiling.block + jnp.arange(tiling.block)
        stored = at < end
        page = triton.load(table.at[row, at // tiling.page_size], mask=stored, other=0)
        kv_at = (head, slots_in(page, at, tiling.page_size)[:, None], columns)
        # Other slots may hold NaN, which a zero weight would not remove.
        readable = stored[:, None] & (columns < tiling.head_dim)
        k, v = (triton.load(part.at[kv_at], mask=readable, other=0) for part in (keys, values))
        visible = visible_old(positions, at, tiling.window, independent) & stored[None, :]
        return state.add(jnp.where(visible, capped_scores(q, k, tiling.softcap), -jnp.inf), v)

    # No query of the tile sees a key before the first block or behind the last.
    end = jnp.minimum(ends[row], jnp.max(positions))
    begin = 0 if tiling.window is None else jnp.maximum(jnp.min(positions) - tiling.window + 1, 0)
    first, stop = begin // tiling.block, pl.cdiv(end, tiling.block)
    each = pl.cdiv(jnp.maximum(stop - first, 0), tiling.splits)
    start = first + split * each
    state = jax.lax.fori_loop(
        start, jnp.minimum(start + each, stop), add, Softmax.of_nothing((tiling.tile, tiling.width))
    )

    at = (split, row, own_head)
    alone = indices < tiling.num_queries
    triton.store(highest.at[(*at, indices)], state.highest, mask=alone)
    triton.store(total.at[(*at, indices)], state.total, mask=alone)
    triton.store(out.at[(*at, indices[:, None], columns)], state.out, mask=real)
