"""95 % intervals of accuracies and of their differences, from the result of every item and every seed.

Two levels: the items are drawn from all that might be asked, and a seed's training is drawn from all trainings. An interval
over items alone says nothing about another training.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

Z95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
Runs = Sequence[Sequence[float]]
"""Scores `[seeds][items]`, of the same items for each seed."""


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    estimate: float
    low: float
    high: float


def wilson(num_right: float | int, num_items: int) -> tuple[float, float]:
    """The interval of a share over items alone (Wilson 1927, the score interval without continuity correction)."""
    share, weight = num_right / num_items, Z95**2 / num_items
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    # Rounding must not exclude the share itself.
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def accuracy(runs: Runs) -> Interval:
    """The mean over seeds; of one seed, which tells nothing about others, over items alone."""
    scores = np.asarray(runs, float)
    if len(scores) == 1:
        return Interval(float(scores.mean()), *wilson(float(scores.sum()), scores.shape[1]))
    found = _interval(scores.mean(), scores.mean(0), [scores])
    return Interval(found.estimate, max(0.0, found.low), min(1.0, found.high))


def difference(ours: Runs, theirs: Runs, *, same_trainings: bool = False) -> Interval:
    """The mean of ours less that of theirs, on the same items, and with `same_trainings` also of the same modules.

    Where both have one seed, the interval is over items alone.
    """
    first, second = np.asarray(ours, float), np.asarray(theirs, float)
    by_item = first.mean(0) - second.mean(0)
    return _interval(by_item.mean(), by_item, [first - second] if same_trainings else [first, second])


def _interval(estimate: float, by_item: np.ndarray, groups: list[np.ndarray]) -> Interval:
    """Student's t with Welch's and Satterthwaite's degrees of freedom, from the variances of the items' and the seeds' means."""
    parts = [(float(by_item.var(ddof=1)) / len(by_item), len(by_item) - 1)]
    for group in groups:
        if len(group) > 1:
            parts.append((float(group.mean(1).var(ddof=1)) / len(group), len(group) - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Interval(float(estimate), float(estimate), float(estimate))
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Interval(float(estimate), float(estimate) - half, float(estimate) + half)
