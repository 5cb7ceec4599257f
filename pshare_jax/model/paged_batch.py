"""The metadata of a step over paged KV, built in NumPy by the engine's workers and read by the jitted steps. No jax."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class PagedBatch(NamedTuple):
    """`page_table` `[B, M]`, `context_lens` `[B]` and `query_lens` `[B]`, all int32.

    Row b's pages hold context_lens[b] tokens; its new ones are at positions context_lens[b], context_lens[b] + 1, ..., of
    which the first query_lens[b] are written and the rest is padding. NumPy arrays, or JAX's inside a jitted step.
    """

    page_table: Any
    context_lens: Any
    query_lens: Any

    @classmethod
    def empty(cls, num_rows: int, table_len: int) -> "PagedBatch":
        """Rows without pages, all padding until they are filled."""
        shapes = (num_rows, table_len), num_rows, num_rows
        return cls(*(np.zeros(shape, np.int32) for shape in shapes))

    def fill(self, row: int, pages: Sequence[int], context_len: int, query_len: int) -> None:
        """Fills one of `empty`'s rows in place: its pages, the tokens that they hold and the number of new ones."""
        self.page_table[row, : len(pages)] = pages
        self.context_lens[row], self.query_lens[row] = context_len, query_len


class ScoreBatch(NamedTuple):
    """A scoring step's metadata: the batch, the token after each new one `[B, T]`, and whether tokens are `independent`.

    An independent token is scored as the first of an answer: the module consumes the token before it on the base's KV,
    and nothing is written. Otherwise the module consumes the tokens one after another, on its own KV.
    """

    batch: PagedBatch
    targets: Any
    independent: Any
