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
    """The given lengths of a row, or the shortest (multiples of 32) that hold every sample and leave little padding."""
    largest = lengths.max(axis=0)
    mean = np.maximum(lengths.mean(axis=0), 1e-9)
    probe = lengths[:WINDOW]
    best, best_fill = (0, 0), -1.0
    for times in (1, 1.5, 2, 3, 4, 6, 8):
        context = context_len or _rounded(largest[0] * times)
        answers = answer_len or _rounded(max(largest[1], mean[1] * context / mean[0] if mean[0] >= 1 else 0))
        if context_len is None:
            # Long answers may want more of a row than the mean does; then the context gets more room, too.
            context = max(context, _rounded(min(mean[0] * answers / mean[1], largest[0] * 8)))
        reached = fill(probe, len(pack(probe, (context, answers))), (context, answers))
        if reached > best_fill + 0.01:
            best, best_fill = (context, answers), reached
        if best_fill >= _WANTED_FILL or context_len:
            break
    return best


def _rounded(length: float) -> int:
    return max(1, -int(-length // _MULTIPLE)) * _MULTIPLE
