"""Which blocks of cached tokens a step reads: run-time lists of (row, block) items, and the items of a trip.

A block is the same number of tokens in every program, so one compilation serves all lengths; the number of trips is the
sum over rows of the blocks that the row sees. `blocked` runs these lists, and tests count them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pshare_jax.model.paged_batch import PagedBatch


class WorkList(NamedTuple):
    """Items `[I]`, of which the first `num_items` are real: a row and one of its blocks.

    Made before the loop, once for all layers with one window: a trip that computed them would compile and run slower.
    """

    rows: Int[Array, "I"]
    blocks: Int[Array, "I"]
    num_items: Int[Array, ""]

    def items(self, index: Int[Array, ""], num: int) -> tuple[Int[Array, "L"], Int[Array, "L"], Bool[Array, "L"]]:
        """(rows, blocks, which are real) of the `index`-th `num` items; the last ones may lie beyond the list's end."""
        wanted = index * num + jnp.arange(num)
        at = jnp.minimum(wanted, len(self.rows) - 1)
        return self.rows[at], self.blocks[at], wanted < self.num_items


class Plan(NamedTuple):
    """The loops of a step. `shared` items are a group's leader and a block for all its rows; rows' own items are `masked`
    where some new token does not see some key of the block, and else `whole`.
    """

    shared: WorkList | None
    whole: WorkList | None
    masked: WorkList


def plan_of(
    batch: PagedBatch,
    ends: Int[Array, "B"],
    num_new: int,
    block_len: int,
    page_size: int,
    window: int | None,
    *,
    with_whole: bool,
) -> Plan:
    """The plan of a step of `num_new` tokens a row, whose stored KV ends at `ends`, in blocks of `block_len` tokens.

    Without `with_whole` all of the rows' own items are masked.
    """
    lengths, most = jnp.asarray(batch.context_lens), -(-batch.page_table.shape[1] * page_size // block_len)
    stop = -(-ends // block_len)
    first = _window_start(lengths, window) // block_len
    if batch.shared is None:
        shared = None
    else:
        together = jnp.asarray(batch.shared.num_pages) * page_size // block_len
        shared = _shared_list(jnp.asarray(batch.shared.leaders), first, together, most)
        first = jnp.maximum(first, together)
    first = jnp.minimum(first, stop)
    if not with_whole:
        return Plan(shared, None, _list(first, stop, stop, stop, most))
    # The last new token sees least of a window's start; all of them see every block that ends before the first.
    whole_first = jnp.clip(-(-_window_start(lengths + num_new - 1, window) // block_len), first, stop)
    whole_stop = jnp.clip(lengths // block_len, whole_first, stop)
    whole = _list(whole_first, whole_stop, whole_stop, whole_stop, most)
    return Plan(shared, whole, _list(first, stop, whole_first, whole_stop, most))


def _window_start(positions: Int[Array, "B"], window: int | None) -> Int[Array, "B"]:
    """The first key that a token at a position sees."""
    return jnp.zeros_like(positions) if window is None else jnp.maximum(positions - window + 1, 0)


def _shared_list(leaders: Array, first: Array, together: Array, most: int) -> WorkList:
    """Blocks that a group has in common, in its leader's place, from the first that any of its rows sees."""
    rows = jnp.arange(len(leaders))
    members = (leaders[None] == rows[:, None]) & (together > 0)
    begin = jnp.min(jnp.where(members, first[None], jnp.iinfo(jnp.int32).max), axis=1)
    stop = jnp.max(jnp.where(members, together[None], 0), axis=1)
    begin = jnp.minimum(begin, stop)
    return _list(begin, stop, stop, stop, most)


def _list(first: Array, stop: Array, gap_at: Array, gap_stop: Array, most: int) -> WorkList:
    """Each row's blocks from `first` to `stop`, at most `most` of them, without those from `gap_at` to `gap_stop`."""
    counts = stop - first - (gap_stop - gap_at)
    stops, index = jnp.cumsum(counts), jnp.arange(len(first) * most)
    rows = jnp.minimum(jnp.sum(stops <= index[:, None], axis=1), len(first) - 1)
    blocks = first[rows] + index - (stops - counts)[rows]
    blocks += jnp.where(blocks >= gap_at[rows], (gap_stop - gap_at)[rows], 0)
    return WorkList(rows, blocks, stops[-1])
