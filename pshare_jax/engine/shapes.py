"""The few shapes of device calls: tokens of a chunk, rows of a batch, pages of a transfer.

Every shape is compiled once; inputs are padded to the next larger shape.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from pshare_jax.model.paged_batch import PagedBatch

CHUNK_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
MAX_ROW_TOKENS = 64
"""Longest chunks that share a call: longer chunks are as fast in calls of their own, without padding (measured on CPU)."""


def bucket_of(size: int, buckets: Sequence[int]) -> int:
    """The least bucket that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)


def pages_for(num_tokens: int, page_size: int) -> int:
    """Number of pages for `num_tokens` tokens."""
    return -(-num_tokens // page_size)


def token_buckets(most: int) -> list[int]:
    """Lengths of a prefill chunk of at most `most` tokens."""
    return [size for size in CHUNK_TOKENS if size < most] + [most]


def row_buckets(most: int) -> list[int]:
    """Numbers of rows of a decode step with at most `most` rows: powers of two, and `most`."""
    return [1 << power for power in range(most.bit_length()) if 1 << power < most] + [most]


def page_buckets(most: int) -> list[int]:
    """Numbers of pages of a transfer of at most `most` pages: 2, 8, 32, ... and `most`."""
    sizes, size = [], 2
    while size < most:
        sizes.append(size)
        size *= 4
    return [*sizes, most]


def padded_batch(
    shape: tuple[int, int], table_len: int, chunks: Iterable[tuple[Sequence[int], int, Sequence[int]]] = ()
) -> tuple[np.ndarray, PagedBatch]:
    """Tokens of that shape (rows, tokens) and their metadata; each chunk fills a row: (pages, tokens in them, new tokens)."""
    tokens, batch = np.zeros(shape, np.int32), PagedBatch.empty(shape[0], table_len)
    for row, (pages, context_len, new) in enumerate(chunks):
        tokens[row, : len(new)] = new
        batch.fill(row, pages, context_len, len(new))
    return tokens, batch


Shape = tuple[int | str, ...]
"""Names the shape of a step: (rows, tokens) of a prefill, (rows,) of a decode step, ("score",) of a scoring step."""


class CompiledShapes:
    """The shapes of steps that may be used: all, or, after `limit`, only those that are compiled.

    Read by workers, extended by the compiling thread.
    """

    def __init__(self) -> None:
        self._only: set[Shape] | None = None
        self._growing = False

    def limit(self, shapes: Iterable[Shape]) -> None:
        """Allows only these shapes from now on, and those added until `settle`."""
        self._only = set(shapes)
        self._growing = True

    def add(self, shape: Shape) -> None:
        """Allows a shape that is now compiled."""
        if self._only is not None:
            self._only.add(shape)

    def give_up(self, shape: Shape) -> None:
        """Drops a shape that failed, since a smaller step may work, unless it is the last of its kind (prefill, decode,
        score).
        """
        if self._only is not None and any(_kind(other) == _kind(shape) and other != shape for other in self._only):
            self._only.discard(shape)

    def settle(self) -> None:
        """No shape will be added any more."""
        self._growing = False

    @property
    def settled(self) -> bool:
        """Whether no shape will be added any more."""
        return not self._growing

    def may_be_used(self, shape: Shape) -> bool:
        """Whether a step may use the shape, now or later."""
        return self._growing or shape in self

    def knows(self, shape: Shape) -> bool:
        """Whether the shape is known to be compiled."""
        return self._only is not None and shape in self._only

    def __contains__(self, shape: Shape) -> bool:
        return self._only is None or shape in self._only


def _kind(shape: Shape) -> tuple[int, type]:
    return len(shape), type(shape[0])


def choose_rows(remaining: Sequence[int], most: int, ready: CompiledShapes) -> tuple[list[int], int]:
    """(indices, bucket) of the next prefill step, from the remaining tokens of the sequences, the oldest first.

    The oldest determines the bucket. Up to four sequences whose next chunk has the same bucket share the call, if it is
    short; the number of rows is 1, 2 or 4, never padded.
    """
    buckets = [size for size in token_buckets(most) if (1, size) in ready]
    chunks = [bucket_of(min(tokens, buckets[-1]), buckets) for tokens in remaining]
    bucket = chunks[0]
    alike = [index for index, chunk in enumerate(chunks) if chunk == bucket]
    shapes = prefill_shapes(most)
    rows = max(n for n in (1, 2, 4) if n <= len(alike) and (n, bucket) in shapes and (n, bucket) in ready)
    return alike[:rows], bucket


def prefill_shapes(most: int) -> list[tuple[int, int]]:
    """All (rows, bucket) that `choose_rows` can give."""
    shapes = [(1, bucket) for bucket in token_buckets(most)]
    short = [bucket for bucket in token_buckets(most) if bucket <= MAX_ROW_TOKENS]
    return shapes + [(rows, bucket) for rows in (2, 4) for bucket in short if rows * bucket <= most]
