"""The paged attention that serves where no kernel does: online softmax (online.py) over blocks of pages, in plain XLA.

A trip of a loop reads blocks of some rows from a list, so a row costs what its own length costs, whatever its neighbours are
(work_list.py). In decode steps, rows whose page tables begin alike read that prefix once: their queries are stacked, and
each row goes on alone from the softmax state it then has (cascade; the state is the log-sum-exp merge).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.model.attention.online import Softmax, capped_scores
from pshare_jax.model.attention.paged import positions_of, stored_ends, visible_new, visible_old
from pshare_jax.model.attention.work_list import WorkList, plan_of
from pshare_jax.model.kv.pages import LayerPages
from pshare_jax.model.layers import soft_cap
from pshare_jax.model.paged_batch import PagedBatch, SharedPrefixes

BLOCK_TOKENS = 256
"""Cached tokens in one block."""
LANES = 4
"""Blocks of a decode trip: a single one is too little work for XLA to share out among a machine's cores."""
WHOLE_TOKENS = 32
"""From this number of new tokens on, blocks that need no mask have a loop of their own; below, a mask costs nothing."""


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

    def blocks(self, rows: Int[Array, "L"], blocks: Int[Array, "L"]) -> tuple[Array, Array, Array]:
        """Keys and values `[K, L, S, H]` of rows' blocks, and the positions `[L, S]`."""
        columns = blocks[:, None] * self.pages_per_block + jnp.arange(self.pages_per_block)
        ids = self.table.at[rows[:, None], columns].get(mode="promise_in_bounds")
        K, _, page_size, H = self.pages[0].shape
        keys, values = (
            part.at[:, ids].get(mode="promise_in_bounds").reshape(K, len(rows), -1, H) for part in self.pages
        )
        block_len = self.pages_per_block * page_size
        return keys, values, blocks[:, None] * block_len + jnp.arange(block_len)


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
    lanes = 1 if T >= WHOLE_TOKENS else LANES

    if batch.shared is None or plan.shared is None:
        state = _new_tokens(step, k, v)
    else:
        state = _shared_blocks(step, batch.shared, plan.shared, k, v)
    if plan.whole is not None:
        state = _own_blocks(step, plan.whole, state, lanes, masked=False)
    state = _own_blocks(step, plan.masked, state, lanes, masked=True)
    heads = state.result().astype(q.dtype).reshape(B, K, N // K, T, H)
    return heads.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _new_tokens(step: _Step, k: Array, v: Array) -> Softmax:
    """The softmax over the new tokens; each sees itself, so all later maxima are those of real scores."""
    visible = jax.vmap(visible_new, in_axes=(0, None, None))(step.positions, step.window, step.independent)
    start = Softmax.of_nothing(step.queries.shape)
    return _add(start, step.queries, k.swapaxes(1, 2), v.swapaxes(1, 2), visible[:, None, None], step.softcap)


def _own_blocks(step: _Step, work: WorkList, state: Softmax, lanes: int, *, masked: bool) -> Softmax:
    """Adds `lanes` blocks a trip, each to the state of its row."""

    def trip(index: Array, state: Softmax) -> Softmax:
        rows, blocks, real = work.items(index, lanes)
        keys, values, slots = step.blocks(rows, blocks)
        visible = None
        if masked:
            stored = slots < step.ends[rows][:, None]
            # Slots past the end may hold NaN, which a zero weight would not remove.
            values = jnp.where(stored[..., None], values, 0)
            see = jax.vmap(visible_old, in_axes=(0, 0, None, None))
            visible = see(step.positions[rows], slots, step.window, step.independent) & stored[:, None]
            visible = visible[:, None]
        # In the order of the keys, whose axes XLA would otherwise transpose.
        queries = step.queries[rows].swapaxes(0, 1)
        parts = _add(Softmax.of_nothing(queries.shape), queries, keys, values, visible, step.softcap)
        parts = jax.tree.map(lambda part: part.swapaxes(0, 1), parts)
        return _merge(state, parts, real & (rows == jnp.arange(len(step.ends))[:, None]))

    return jax.lax.fori_loop(0, -(-work.num_items // lanes), trip, state)


def _merge(state: Softmax, parts: Softmax, mine: Bool[Array, "B L"]) -> Softmax:
    """The states `[B, K, Q]` with those of the parts `[L, K, Q]` that are a row's own."""
    mine = mine[:, :, None, None]
    highest = jnp.maximum(state.highest, jnp.where(mine, parts.highest, -jnp.inf).max(1))
    weights, shrink = jnp.exp(parts.highest - highest[:, None]), jnp.exp(state.highest - highest)
    # Masked after the products: zero weights would not keep NaN in one row's pages from the others.
    totals = jnp.where(mine, weights * parts.total, 0)
    outs = jnp.where(mine[..., None], weights[..., None] * parts.out, 0)
    return Softmax(highest, state.total * shrink + totals.sum(1), state.out * shrink[..., None] + outs.sum(1))


def _shared_blocks(step: _Step, groups: SharedPrefixes, work: WorkList, k: Array, v: Array) -> Softmax:
    """The softmax over the new tokens, one a row, and the groups' blocks; a trip adds one block to the states of the rows of a
    group, from one product with the queries of all rows. Rows' own blocks are not read so: of 8 rows at 2,304 tokens a decode
    step took 161 ms, and 97 with `_own_blocks`.
    """
    B, K, G, _ = step.queries.shape
    leaders, num_pages = jnp.asarray(groups.leaders), jnp.asarray(groups.num_pages)
    queries = step.queries.swapaxes(0, 1).reshape(K, B * G, -1)

    def trip(index: Array, state: Softmax) -> Softmax:
        leader, block, _ = work.items(index, 1)
        members = (leaders == leader) & (num_pages > 0)
        keys, values, slots = step.blocks(leader, block)
        # Shared blocks are full pages, so all of their slots are stored.
        seen = jax.vmap(visible_old, in_axes=(0, None, None, None))(step.positions, slots[0], step.window, None)[:, 0]
        visible = jnp.repeat(seen & members[:, None], G, axis=0)[None]
        added = _add(state, queries, keys[:, 0], values[:, 0], visible, step.softcap)
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
    queries: Float[Array, "*A Q H"],
    keys: Float[Array, "*A S H"],
    values: Float[Array, "*A S H"],
    visible: Bool[Array, "*B T S"] | None,
    softcap: float | None,
) -> Softmax:
    """The softmax with more keys and values; query q is of token q % T. `visible` is broadcast to `[*A, Q / T, T, S]`; None
    means that all are.
    """
    scores = capped_scores(queries, keys, softcap)
    if visible is not None:
        by_token = scores.reshape(*scores.shape[:-2], -1, *visible.shape[-2:])
        scores = jnp.where(visible, by_token, -jnp.inf).reshape(scores.shape)
    return state.add(scores, values)
