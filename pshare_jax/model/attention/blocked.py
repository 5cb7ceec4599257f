"""The paged attention that serves: online softmax (FlashAttention, arXiv 2205.14135, alg. 1) over blocks of pages.

A trip of a loop reads one block for one row, so a row costs what its own length costs, whatever its neighbours are
(work_list.py). In decode steps, rows whose page tables begin alike read that prefix once: their queries are stacked, and
each row goes on alone from the softmax state it then has (cascade; the state is the log-sum-exp merge).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.model.attention.paged import positions_of, stored_ends, visible_new, visible_old
from pshare_jax.model.attention.work_list import WorkList, plan_of
from pshare_jax.model.kv.pages import LayerPages
from pshare_jax.model.layers import soft_cap
from pshare_jax.model.paged_batch import PagedBatch, SharedPrefixes

BLOCK_TOKENS = 256
"""Cached tokens in one block."""
WHOLE_TOKENS = 32
"""From this number of new tokens on, blocks that need no mask have a loop of their own; below, a mask costs nothing."""


class Softmax(NamedTuple):
    """An online softmax: the highest score so far, the sum of weights, and the weighted values, all in float32."""

    highest: Float[Array, "... Q"]
    total: Float[Array, "... Q"]
    out: Float[Array, "... Q H"]


class _Step(NamedTuple):
    """What the loops of one layer read."""

    queries: Float[Array, "B K Q H"]
    pages: LayerPages
    table: Int[Array, "B M"]
    ends: Int[Array, "B"]
    positions: Int[Array, "B T"]
    pages_per_block: int
    window: int | None
    softcap: float | None
    independent: Bool[Array, ""] | None

    def block(self, row: Array, index: Array) -> tuple[Array, Array, Array]:
        """Keys and values `[K, S, H]` of a row's block, and the positions `[S]`."""
        ids = jax.lax.dynamic_slice(self.table, (row, index * self.pages_per_block), (1, self.pages_per_block))[0]
        K, _, page_size, H = self.pages[0].shape
        keys, values = (part.at[:, ids].get(mode="promise_in_bounds").reshape(K, -1, H) for part in self.pages)
        block_len = self.pages_per_block * page_size
        return keys, values, index * block_len + jnp.arange(block_len)


def blocked(
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
    """Attention to the new tokens, then to blocks that rows share, then to each row's own blocks."""
    B, T, N, H = q.shape
    K, page_size, table_len = k.shape[2], pages[0].shape[2], batch.page_table.shape[1]
    queries = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H) * scale
    per_block = min(max(1, BLOCK_TOKENS // page_size), table_len)
    # Padded to whole blocks: at its end dynamic_slice would shift the block.
    table = jnp.pad(batch.page_table, ((0, 0), (0, -table_len % per_block)))
    ends, positions = stored_ends(batch, independent), positions_of(batch, T)
    step = _Step(queries, pages, table, ends, positions, per_block, window, softcap, independent)
    plan = plan_of(batch, ends, T, per_block * page_size, page_size, window, with_whole=T >= WHOLE_TOKENS)

    if batch.shared is None or plan.shared is None:
        state = _new_tokens(step, k, v)
    else:
        state = _shared_blocks(step, batch.shared, plan.shared, k, v)
    if plan.whole is not None:
        state = _own_blocks(step, plan.whole, state, masked=False)
    state = _own_blocks(step, plan.masked, state, masked=True)
    heads = (state.out / state.total[..., None]).astype(q.dtype).reshape(B, K, N // K, T, H)
    return heads.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _new_tokens(step: _Step, k: Array, v: Array) -> Softmax:
    """The softmax over the new tokens; each sees itself, so all later maxima are finite."""
    B, K, Q, H = step.queries.shape
    start = Softmax(
        jnp.full((B, K, Q), -jnp.inf, jnp.float32),
        jnp.zeros((B, K, Q), jnp.float32),
        jnp.zeros((B, K, Q, H), jnp.float32),
    )
    visible = jax.vmap(visible_new, in_axes=(0, None, None))(step.positions, step.window, step.independent)
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return jax.vmap(functools.partial(_add, softcap=step.softcap))(start, step.queries, keys, values, visible)


def _own_blocks(step: _Step, work: WorkList, state: Softmax, *, masked: bool) -> Softmax:
    """Adds one row's block a trip."""

    def trip(index: Array, state: Softmax) -> Softmax:
        row, block = work.item(index)
        keys, values, slots = step.block(row, block)
        visible = None
        if masked:
            stored = slots < step.ends[row]
            # Slots past the end may hold NaN, which a zero weight would not remove.
            values = jnp.where(stored[:, None], values, 0)
            visible = visible_old(step.positions[row], slots, step.window, step.independent) & stored
        own = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, row, keepdims=False), state)
        queries = jax.lax.dynamic_index_in_dim(step.queries, row, keepdims=False)
        own = _add(own, queries, keys, values, visible, step.softcap)
        return jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, row, 0), state, own)

    return jax.lax.fori_loop(0, work.num_items, trip, state)


def _shared_blocks(step: _Step, groups: SharedPrefixes, work: WorkList, k: Array, v: Array) -> Softmax:
    """The softmax over the new tokens, one a row, and the groups' blocks; a trip adds one block to the states of the rows of a
    group, from one product with the queries of all rows. Rows' own blocks are not read so: of 8 rows at 2,304 tokens a decode
    step took 161 ms, and 97 with `_own_blocks`.
    """
    B, K, G, _ = step.queries.shape
    leaders, num_pages = jnp.asarray(groups.leaders), jnp.asarray(groups.num_pages)
    queries = step.queries.swapaxes(0, 1).reshape(K, B * G, -1)

    def trip(index: Array, state: Softmax) -> Softmax:
        leader, block = work.item(index)
        members = (leaders == leader) & (num_pages > 0)
        keys, values, slots = step.block(leader, block)
        # Shared blocks are full pages, so all of their slots are stored.
        seen = jax.vmap(visible_old, in_axes=(0, None, None, None))(step.positions, slots, step.window, None)[:, 0]
        visible = jnp.repeat(seen & members[:, None], G, axis=0)
        added = _add(state, queries, keys, values, visible, step.softcap)
        # A zero weight would not keep NaN in one group's pages from the other rows.
        return added._replace(out=jnp.where(jnp.repeat(members, G)[:, None], added.out, state.out))

    state = _first_tokens(queries, k[:, 0], v[:, 0], step.softcap)
    state = jax.lax.fori_loop(0, work.num_items, trip, state)
    return jax.tree.map(lambda part: part.reshape(K, B, G, *part.shape[2:]).swapaxes(0, 1), state)


def _first_tokens(
    queries: Float[Array, "K Q H"], k: Float[Array, "B K H"], v: Float[Array, "B K H"], softcap: float | None
) -> Softmax:
    """The softmax of stacked queries over their row's one new token, whose weight is 1."""
    K, Q, H = queries.shape
    own = queries.reshape(K, len(k), -1, H)
    scores = jnp.einsum("KBGH,BKH->KBG", own, k, preferred_element_type=jnp.float32)
    values = jnp.broadcast_to(v.swapaxes(0, 1)[:, :, None].astype(jnp.float32), own.shape)
    return Softmax(soft_cap(scores, softcap).reshape(K, Q), jnp.ones((K, Q), jnp.float32), values.reshape(K, Q, H))


def _add(
    state: Softmax,
    queries: Float[Array, "K Q H"],
    keys: Float[Array, "K S H"],
    values: Float[Array, "K S H"],
    visible: Bool[Array, "T S"] | None,
    softcap: float | None,
) -> Softmax:
    """The softmax with more keys and values; query q is of token q % T, and `visible` None means that all are."""
    scores = jnp.einsum("KQH,KSH->KQS", queries, keys, preferred_element_type=jnp.float32)
    scores = soft_cap(scores, softcap)
    if visible is not None:
        K, Q, S = scores.shape
        by_token = scores.reshape(K, -1, len(visible), S)
        scores = jnp.where(visible, by_token, -jnp.inf).reshape(K, Q, S)
    highest = jnp.maximum(state.highest, scores.max(-1))
    weights, shrink = jnp.exp(scores - highest[..., None]), jnp.exp(state.highest - highest)
    product = jnp.einsum("KQS,KSH->KQH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Softmax(highest, state.total * shrink + weights.sum(-1), state.out * shrink[..., None] + product)
