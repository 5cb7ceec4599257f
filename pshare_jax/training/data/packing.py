"""Packing of samples into rows: first-fit in two dimensions, context tokens and answer tokens.

Pure functions over lengths: the plan of an epoch depends on data and seed only, so any worker can build any batch.
"""

import numpy as np
from jaxtyping import Int64

# Samples that are packed together: a larger window fills rows better, a smaller one keeps the shuffled order.
WINDOW = 1024
_MULTIPLE = 32
_WANTED_FILL = 0.92
_TRIED_TIMES = (1, 1.5, 2, 3, 4, 6, 8)
# Bounds the free length of a row if the other is given, for data whose contexts are almost empty.
_MOST_SAMPLES = 4096


def pack(
    lengths: Int64[np.ndarray, "N 2"], capacity: tuple[int, int], rng: np.random.PCG64 | None = None
) -> list[list[int]]:
    """Rows of indices into `lengths` (context and answer tokens), with sums within `capacity`; every index once.

    A window of samples is packed largest first; its rows are then shuffled by `rng` (None: not), so that long samples
    are not all in the first batches.

    Raises:
        ValueError: a sample is larger than a row.
    """
    limit = np.asarray(capacity, np.int64)
    if (lengths > limit).any():
        raise ValueError(f"a sample is larger than a row of {capacity}")
    rows: list[list[int]] = []
    for start in range(0, len(lengths), WINDOW):
        window = lengths[start : start + WINDOW]
        packed = _pack_window(window, limit)
        order = range(len(packed)) if rng is None else random_order(rng, len(packed))
        rows += [[start + index for index in packed[at]] for at in order]
    return rows


def _pack_window(lengths: np.ndarray, limit: np.ndarray) -> list[list[int]]:
    free = np.tile(limit, (len(lengths), 1))
    rows: list[list[int]] = []
    largest_first = np.argsort(-(lengths / np.maximum(limit, 1)).max(axis=1), kind="stable")
    for index in largest_first.tolist():
        row = int((free[: len(rows) + 1] >= lengths[index]).all(axis=1).argmax())
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        free[row] -= lengths[index]
    return rows


def random_order(rng: np.random.PCG64, count: int) -> np.ndarray:
    """A permutation of range(count), from raw bits, which are stable across NumPy versions."""
    return np.argsort(rng.random_raw(count), kind="stable")


def fill(lengths: Int64[np.ndarray, "N 2"], num_rows: int, capacity: tuple[int, int]) -> float:
    """The fraction of the positions in `num_rows` rows that hold tokens and not padding."""
    return float(lengths.sum() / max(1, num_rows * sum(capacity)))


def choose_capacity(
    lengths: Int64[np.ndarray, "N 2"], context_len: int | None, answer_len: int | None
) -> tuple[int, int]:
    """Context and answer length of a row: as given, or multiples of 32 chosen from the data. Chosen lengths have the
    ratio of all context to all answer tokens, fit every sample, and are the shortest with little padding.
    """
    if context_len and answer_len:
        return context_len, answer_len
    largest, mean = lengths.max(axis=0), np.maximum(lengths.mean(axis=0), 1e-9)
    if context_len or answer_len:
        # The number of average samples that the given length holds.
        samples = context_len / mean[0] if context_len else (answer_len or 0) / mean[1]
        found = _rounded(largest, mean * min(samples, _MOST_SAMPLES))
        return context_len or found[0], answer_len or found[1]
    probe = lengths[:WINDOW]
    least = (largest / mean).max()
    tried = [_rounded(largest, mean * least * times) for times in _TRIED_TIMES]
    fills = [fill(probe, len(pack(probe, capacity)), capacity) for capacity in tried]
    good = [capacity for capacity, reached in zip(tried, fills, strict=True) if reached >= _WANTED_FILL]
    return good[0] if good else tried[int(np.argmax(fills))]


def _rounded(largest: np.ndarray, wanted: np.ndarray) -> tuple[int, int]:
    context, answers = (
        (np.ceil(np.maximum(np.maximum(largest, wanted), 1) / _MULTIPLE) * _MULTIPLE).astype(int).tolist()
    )
    return context, answers
