"""The metadata of a step over paged KV: engine workers build it in NumPy, jitted steps read it. No jax."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

AttentionForm = Literal["xla", "pallas"]
"""Forms of attention over pages (model/paged_steps.py: `attention_of`)."""
MIN_SHARED_TOKENS = 256
"""Shorter prefixes are not read together: a block of attention (model/attention/blocked.py) would not be full. Longer ones
always are: the loop is the same, with fewer trips (four rows on one context of 2,304: 0.53 of the attention's CPU time).
"""


class SharedPrefixes(NamedTuple):
    """Which rows read the start of their context together: `leaders` and `num_pages` `[B]`, int32.

    Rows of one group name one of them as their leader, and their page tables begin with the same `num_pages` full pages.
    `num_pages` is 0 for a row that shares nothing.
    """

    leaders: Any
    num_pages: Any

    @classmethod
    def none(cls, num_rows: int) -> "SharedPrefixes":
        """Rows that share nothing."""
        return cls(np.arange(num_rows, dtype=np.int32), np.zeros(num_rows, np.int32))


class PagedBatch(NamedTuple):
    """`page_table` `[B, M]`, `context_lens`, `query_lens` and `adapters` `[B]`, all int32.

    Row b's pages hold context_lens[b] tokens; its new tokens are at positions context_lens[b], ...: the first
    query_lens[b] are written, the others are padding. adapters[b] is the slot of its LoRA adapter, 0 for none. NumPy arrays,
    or JAX's inside a jitted step. `shared` is for decode steps; other steps, and those of one row, have None.
    """

    page_table: Any
    context_lens: Any
    query_lens: Any
    adapters: Any
    shared: SharedPrefixes | None = None

    @classmethod
    def empty(cls, num_rows: int, table_len: int) -> "PagedBatch":
        """Rows of padding, without pages."""
        lens, queries, adapters = (np.zeros(num_rows, np.int32) for _ in range(3))
        return cls(np.zeros((num_rows, table_len), np.int32), lens, queries, adapters)

    def fill(self, row: int, pages: Sequence[int], context_len: int, query_len: int, adapter: int) -> None:
        """Fill a row of an `empty` batch in place: its pages, the number of tokens in them, and of new tokens; its adapter."""
        self.page_table[row, : len(pages)] = pages
        self.context_lens[row], self.query_lens[row], self.adapters[row] = context_len, query_len, adapter


def shared_prefixes(
    page_tables: Sequence[Sequence[int]] | np.ndarray, context_lens: Sequence[int] | np.ndarray, page_size: int
) -> SharedPrefixes:
    """The groups of rows that save the most reads of pages; each row is in one group or in none.

    Only pages that are full of context are compared, so the result stays valid while a batch has the same rows.
    """
    lens = np.asarray(context_lens) // page_size
    tables = [np.asarray(table[:num]).tolist() for table, num in zip(page_tables, lens.tolist(), strict=True)]
    # In this order, rows with a common prefix are neighbours.
    order = sorted(range(len(tables)), key=lambda row: tables[row])
    common = [_common_len(tables[row], tables[after]) for row, after in itertools.pairwise(order)]
    shared = SharedPrefixes.none(len(tables))
    for start, stop, num_pages in _best_groups(common, 0, len(tables))[1]:
        if num_pages * page_size >= MIN_SHARED_TOKENS:
            rows = order[start:stop]
            shared.leaders[rows], shared.num_pages[rows] = min(rows), num_pages
    return shared


def _common_len(one: Sequence[int], other: Sequence[int]) -> int:
    alike = zip(one, other, strict=False)
    return next((index for index, (page, same) in enumerate(alike) if page != same), min(len(one), len(other)))


def _best_groups(common: list[int], start: int, stop: int) -> tuple[int, list[tuple[int, int, int]]]:
    """(pages saved, groups (start, stop, pages)) of sorted rows: one group of all of them, or the best of its parts.

    common[i] is the length of the common prefix of rows i and i + 1.
    """
    if stop - start < 2:
        return 0, []
    least = min(common[start : stop - 1])
    cuts = [start, *(row + 1 for row in range(start, stop - 1) if common[row] == least), stop]
    parts = [_best_groups(common, *part) for part in itertools.pairwise(cuts)]
    saved, together = sum(part[0] for part in parts), (stop - start - 1) * least
    if together > saved:
        return together, [(start, stop, least)]
    return saved, [group for part in parts for group in part[1]]


class DecodeBatch(NamedTuple):
    """A decode step's metadata. The last token of each sequence and its page table are on the device, by slot: the host sends
    a few numbers for each row `[B]`, all int32.

    `tokens` `[slots + 1]` is on the device; row b consumes tokens[slots[b]] at position context_lens[b], in the page
    new_pages[b], which becomes an entry of the slot's page table. Rows of padding have the last slot. `shared` as in
    `PagedBatch`.
    """

    tokens: Any
    slots: Any
    context_lens: Any
    new_pages: Any
    adapters: Any
    shared: SharedPrefixes | None

    @classmethod
    def empty(cls, tokens: Any, num_rows: int, padding_slot: int) -> "DecodeBatch":
        """Rows of padding."""
        lens, pages, adapters = (np.zeros(num_rows, np.int32) for _ in range(3))
        shared = SharedPrefixes.none(num_rows) if num_rows > 1 else None
        return cls(tokens, np.full(num_rows, padding_slot, np.int32), lens, pages, adapters, shared)

    def fill(self, row: int, slot: int, context_len: int, new_page: int, adapter: int) -> None:
        """Fill a row of an `empty` batch in place."""
        self.slots[row], self.context_lens[row] = slot, context_len
        self.new_pages[row], self.adapters[row] = new_page, adapter


class ScoreBatch(NamedTuple):
    """A scoring step's metadata: the batch, the token after each new token `[B, T]`, whether tokens are `independent`.

    Independent tokens are each scored as the first token of an answer: the module consumes the previous token on the
    base's KV, and writes nothing. Otherwise the module consumes the tokens one after another on its own KV.
    """

    batch: PagedBatch
    targets: Any
    independent: Any
