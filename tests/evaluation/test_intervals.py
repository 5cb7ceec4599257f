"""Intervals hold the true value as often as they say, over new items and new trainings."""

import numpy as np
import pytest

from pshare_jax.evaluation.intervals import accuracy, difference, wilson

pytestmark = pytest.mark.host


def drawn(draw, seeds: int, items: int, share: float, spread: float) -> np.ndarray:
    """Answers of `seeds` trainings, whose own accuracies vary by `spread`, to items of their own difficulty."""
    hard = draw.normal(0, 0.15, items)
    trained = np.clip(draw.normal(share, spread, seeds), 0.02, 0.98)
    return (draw.random((seeds, items)) < np.clip(trained[:, None] + hard, 0, 1)).astype(float)


@pytest.mark.parametrize("spread", [0.0, 0.05])
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_cover_the_truth(seeds, spread):
    draw, inside, apart = np.random.default_rng(4), 0, 0
    for _ in range(400):
        ours, theirs = drawn(draw, seeds, 200, 0.5, spread), drawn(draw, seeds, 200, 0.5, spread)
        inside += accuracy(ours.tolist()).low <= 0.5 <= accuracy(ours.tolist()).high
        found = difference(ours.tolist(), theirs.tolist())
        apart += found.low <= 0 <= found.high
    # Of 95 %, less three standard errors of 400 draws.
    assert inside >= 0.92 * 400
    assert apart >= 0.92 * 400


def test_an_interval_over_items_alone_misses_other_trainings():
    """What the two levels are for: the same draws, with the seeds' means taken as one run's."""
    draw, inside = np.random.default_rng(4), 0
    for _ in range(400):
        runs = drawn(draw, 3, 500, 0.5, 0.05)
        low, high = wilson(runs.mean() * 500, 500)
        inside += low <= 0.5 <= high
    assert inside < 0.9 * 400


def test_one_seed_is_wilsons():
    assert accuracy([[1.0, 0.0, 0.0, 0.0]])[1:] == wilson(1, 4)
    assert accuracy([[0.0] * 500]).high == pytest.approx(0.0076, abs=1e-4)


def test_the_same_trainings_are_paired():
    """Seeds that differ by 30 points, each changed by the same 2 %."""
    draw = np.random.default_rng(1)
    theirs = np.stack([draw.random(500) < share for share in (0.4, 0.55, 0.7)]).astype(float)
    ours = theirs.copy()
    ours[:, :10] = 1
    paired = difference(ours.tolist(), theirs.tolist(), same_trainings=True)
    assert paired.high - paired.low < 0.03
    loose = difference(ours.tolist(), theirs.tolist())
    assert loose.high - loose.low > 0.4


def test_differences_are_paired_by_item():
    draw = np.random.default_rng(1)
    ours = (draw.random(300) < 0.5).astype(float)
    theirs = ours.copy()
    theirs[:6] = 0
    found = difference([ours.tolist()], [theirs.tolist()])
    assert found.estimate == pytest.approx(ours[:6].sum() / 300)
    # Unpaired, two shares of 300 would differ by 8 points.
    assert found.high - found.low < 0.04
    assert difference([ours.tolist()], [ours.tolist()]) == (0, 0, 0)
