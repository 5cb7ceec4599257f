"""Which samples share a row: first-fit in two dimensions, tokens of the context and of the answers.

Pure functions over lengths, so a whole epoch is planned before it starts: the plan depends on nothing but the data and
the seed, hence not on workers, and any batch of it can be made at random.
"""

import numpy as np
from jaxtyping import Int64

# Samples that are packed together. More fill rows better, fewer keep the order of the shuffle.
WINDOW = 1024
_MULTIPLE = 32
_WANTED_FILL = 0.92
_TRIED_TIMES = (1, 1.5, 2, 3, 4, 6, 8)
# In a row whose other length is given; more than this only where contexts are next to empty.
_MOST_SAMPLES = 4096


def pack(
    lengths: Int64[np.ndarray, "N 2"], capacity: tuple[int, int], rng: np.random.PCG64 | None = None
) -> list[list[int]]:
    """Rows of indices into `lengths` (context and answer tokens), each sum within `capacity`; every index once.

    Each window of samples is packed with the largest first, and its rows come in an order drawn from `rng` (None: as
    they were opened), so that early batches are not the long ones.

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
    """A permutation of range(count). From raw bits, which NumPy keeps the same over its versions."""
    return np.argsort(rng.random_raw(count), kind="stable")


def fill(lengths: Int64[np.ndarray, "N 2"], num_rows: int, capacity: tuple[int, int]) -> float:
    """The share of the places in `num_rows` rows that hold tokens and not padding."""
    return float(lengths.sum() / max(1, num_rows * sum(capacity)))


def choose_capacity(
    lengths: Int64[np.ndarray, "N 2"], context_len: int | None, answer_len: int | None
) -> tuple[int, int]:
    """The given lengths of a row, or ones that suit the data (multiples of 32): in the proportion of all context to all
    answer tokens, long enough for every sample, and the shortest such that leave little padding.
    """
    if context_len and answer_len:
        return context_len, answer_len
    largest, mean = lengths.max(axis=0), np.maximum(lengths.mean(axis=0), 1e-9)
    if context_len or answer_len:
        # As many average samples in a row as the given length holds.
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
