"""The few shapes of device calls: tokens of a chunk, rows of a batch, pages of a transfer.

Every shape is compiled once; inputs are padded to the next larger shape.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pshare_jax.model.paged_batch import PagedBatch

CHUNK_TOKENS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
MAX_ROW_TOKENS = 64
"""Longest chunks that share a call: longer chunks are as fast in calls of their own, without padding (measured on CPU)."""
PADDED_PAGES = 6
"""A transfer costs as much as this many pages of padding (measured on CPU: 0.72 ms for 2 pages, 1.22 ms for 8)."""


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


def page_buckets(most: int, platform: str) -> list[int]:
    """Numbers of pages of a transfer, where a chunk has at most `most` pages.

    Four transfers of 8 pages are faster on CPU than one of 32 (4.9 and 16 ms, 23 MB); on accelerators each costs the host
    as much as many pages.
    """
    sizes = (2, 8) if platform == "cpu" else (2, 8, 32)
    return [size for size in sizes if size < most] + [most] * (most <= sizes[-1])


def transfer_ranges(first: int, last: int, buckets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The pages from `first` to `last` in ranges of one transfer each: a full bucket, or a padded one where that costs less
    than another transfer.
    """
    while first < last:
        left = last - first
        fitting = [size for size in buckets if size <= left]
        larger = next((size for size in buckets if size >= left), None)
        padded = larger is not None and (larger - left < PADDED_PAGES or not fitting)
        end = last if padded else first + fitting[-1]
        yield first, end
        first = end


def padded_batch(
    shape: tuple[int, int], table_len: int, chunks: Iterable[tuple[Sequence[int], int, Sequence[int], int]] = ()
) -> tuple[np.ndarray, PagedBatch]:
    """Tokens of that shape (rows, tokens) and their metadata; each chunk fills a row: (pages, tokens in them, new tokens,
    adapter slot).
    """
    tokens, batch = np.zeros(shape, np.int32), PagedBatch.empty(shape[0], table_len)
    for row, (pages, context_len, new, adapter) in enumerate(chunks):
        tokens[row, : len(new)] = new
        batch.fill(row, pages, context_len, len(new), adapter)
    return tokens, batch


Shape = tuple[int | str, ...]
"""Names the shape of a step: (rows, tokens) of a prefill, (rows,) of a decode step, ("score", rows) of a scoring step."""


class CompiledShapes:
    """The shapes of a worker's steps that may be used: `shapes`, or, after `limit`, only those that are compiled.

    Read by workers, extended by the compiling thread. The set is replaced, never changed, so it may be read at any time.
    """

    def __init__(self, shapes: Iterable[Shape]):
        self._usable = frozenset(shapes)
        self._given_up: frozenset[Shape] = frozenset()
        self._limited = self._growing = False
        self._lock = threading.Lock()

    def limit(self, shapes: Iterable[Shape]) -> None:
        """Allows only these shapes from now on, and those added until `settle`."""
        with self._lock:
            self._usable = frozenset(shapes) - self._given_up
            self._limited = self._growing = True

    def add(self, shape: Shape) -> None:
        """Allows a shape that is now compiled, unless it was given up."""
        with self._lock:
            self._usable |= {shape} - self._given_up

    def give_up(self, shape: Shape) -> bool:
        """Drops a shape that failed, since a smaller step may work; False if it is the last of its kind (prefill, decode,
        score), which stays in use.
        """
        with self._lock:
            rest = self._usable - {shape}
            if not any(_replaces(other, shape) for other in rest):
                return False
            self._usable, self._given_up = rest, self._given_up | {shape}
            return True

    def bring_back(self, shape: Shape) -> None:
        """Allows a shape again that was given up."""
        with self._lock:
            if shape in self._given_up:
                self._usable, self._given_up = self._usable | {shape}, self._given_up - {shape}

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
        return self._limited and shape in self

    def __contains__(self, shape: Shape) -> bool:
        return shape in self._usable


def _replaces(other: Shape, shape: Shape) -> bool:
    """Whether steps of the other shape can do the work of this shape, if perhaps in more steps."""
    if isinstance(shape[0], str):
        return other == (shape[0], 1)
    same_kind = len(other) == len(shape) and not isinstance(other[0], str)
    return same_kind and (len(shape) == 1 or other[0] == 1)


def choose_rows(remaining: Sequence[int], most: int, ready: CompiledShapes) -> tuple[list[int], int]:
    """(indices, bucket) of the next prefill step, from the remaining tokens of the sequences, the most urgent first.

    The first determines the bucket. Up to four sequences whose next chunk has the same bucket share the call, if it is
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
