"""The metadata of a step over paged KV: engine workers build it in NumPy, jitted steps read it. No jax."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class PagedBatch(NamedTuple):
    """`page_table` `[B, M]`, `context_lens` `[B]` and `query_lens` `[B]`, all int32.

    Row b's pages hold context_lens[b] tokens; its new tokens are at positions context_lens[b], ...: the first
    query_lens[b] are written, the others are padding. NumPy arrays, or JAX's inside a jitted step.
    """

    page_table: Any
    context_lens: Any
    query_lens: Any

    @classmethod
    def empty(cls, num_rows: int, table_len: int) -> "PagedBatch":
        """Rows of padding, without pages."""
        shapes = (num_rows, table_len), num_rows, num_rows
        return cls(*(np.zeros(shape, np.int32) for shape in shapes))

    def fill(self, row: int, pages: Sequence[int], context_len: int, query_len: int) -> None:
        """Fill a row of an `empty` batch in place: its pages, the number of tokens in them, and of new tokens."""
        self.page_table[row, : len(pages)] = pages
        self.context_lens[row], self.query_lens[row] = context_len, query_len


class ScoreBatch(NamedTuple):
    """A scoring step's metadata: the batch, the token after each new token `[B, T]`, whether tokens are `independent`.

    Independent tokens are each scored as the first token of an answer: the module consumes the previous token on the
    base's KV, and writes nothing. Otherwise the module consumes the tokens one after another on its own KV.
    """

    batch: PagedBatch
    targets: Any
    independent: Any
