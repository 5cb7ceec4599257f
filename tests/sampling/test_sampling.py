"""Sampling equals a NumPy reference, and a draw depends on (seed, choice, position) alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.sampling.params import SamplingParams
from pshare_jax.sampling.sample import kept, sample

VOCAB = 23
jitted_kept = jax.jit(kept)


def reference_kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Ids that may be drawn, computed token by token from the sorted probabilities."""
    scores = logits.astype(np.float64) / temperature
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if top_k:
        order = order[:top_k]
    weights = np.exp(scores[order] - scores[order[0]])
    weights /= weights.sum()
    allowed, mass = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if not allowed or ((mass < top_p or top_p == 1) and weight >= min_p * weights[0]):
            allowed.add(token)
        mass += weight
    return allowed


def ours_kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    scores = jnp.asarray(logits, jnp.float32) / temperature
    masked = np.asarray(jitted_kept(scores, jnp.int32(top_k), jnp.float32(top_p), jnp.float32(min_p)))
    finite = np.isfinite(masked)
    np.testing.assert_array_equal(masked[finite], np.asarray(scores)[finite])
    return set(np.flatnonzero(finite).tolist())


def is_borderline(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, margin: float = 1e-5
) -> bool:
    """Whether rounding decides: a cumulative mass or a ratio within `margin` of an active limit."""
    scores = np.sort(logits.astype(np.float64) / temperature)[::-1]
    weights = np.exp(scores - scores[0])[: top_k or None]
    shares = weights / weights.sum()
    near_mass = np.any(np.abs(np.cumsum(shares) - top_p) < margin) and top_p < 1
    return bool(near_mass or (np.any(np.abs(weights - min_p) < margin) and min_p > 0))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(0.1, 5.0),
    st.integers(0, VOCAB + 3),
    st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    st.one_of(st.just(0.0), st.floats(0.01, 1.0)),
)
def test_masks(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
    arguments = (logits, temperature, top_k, top_p, min_p)
    if is_borderline(*arguments):
        return
    assert ours_kept(*arguments) == reference_kept(*arguments)


@pytest.mark.parametrize(
    "limits",
    [
        (0, 0.5, 0.0),
        (0, 0.97, 0.0),
        (1023, 1.0, 0.0),
        (1024, 1.0, 0.0),
        (1025, 1.0, 0.0),
        (1024, 0.9999, 0.0),
        (2500, 0.3, 0.0),
        (2500, 0.9, 0.0),
        (0, 1.0, 0.001),
        (0, 1.0, 0.5),
        (4000, 0.999, 0.01),
    ],
)
def test_masks_of_a_large_vocabulary(limits):
    """With limits that the best 1024 tokens satisfy, and limits that need more."""
    compared = 0
    for seed, spread in enumerate((0.1, 1.0, 1.0, 2.0, 6.0)):
        logits = np.random.default_rng(seed).normal(0, spread, 3000).astype(np.float32)
        if not is_borderline(logits, 1.0, *limits, margin=1e-6):
            assert ours_kept(logits, 1.0, *limits) == reference_kept(logits, 1.0, *limits)
            compared += 1
    assert compared > 1


def test_ties_keep_the_lower_id():
    logits = np.zeros(6, np.float32)
    assert ours_kept(logits, 1.0, 2, 1.0, 0.0) == {0, 1}
    assert ours_kept(logits, 1.0, 0, 0.4, 0.0) == {0, 1, 2}
    assert ours_kept(logits, 1.0, 0, 1.0, 1.0) == set(range(6))


def test_the_best_token_always_stays():
    logits = np.array([0.0, 3.0, 1.0], np.float32)
    for top_k, top_p, min_p in ((1, 1.0, 0.0), (0, 0.0, 0.0), (0, 1e-9, 0.0), (0, 1.0, 1.0)):
        assert ours_kept(logits, 1.0, top_k, top_p, min_p) == {1}


@pytest.mark.parametrize(("size", "temperature"), [(VOCAB, 0.1), (VOCAB, 0.02), (50_000, 1.0)])
def test_limits_that_are_off_keep_every_token(size, temperature):
    """Rounding of a cumulative sum must not drop the last tokens."""
    for seed in range(5):
        logits = np.random.default_rng(seed).normal(0, 2, size).astype(np.float32)
        assert len(ours_kept(logits, temperature, 0, 1.0, 0.0)) == size


def test_greedy():
    logits = jnp.array([0.5, -1.0, 2.5, 2.0])
    token, gap = sample(logits, SamplingParams(top_k=3, seed=9), 5)
    assert int(token) == 2
    assert float(gap) == 0.5
    assert token.dtype == jnp.int32
    assert token.shape == ()


def draw(logits: Any, position: int = 0, **changes: Any) -> int:
    return int(sample(jnp.asarray(logits), SamplingParams(**{"temperature": 1.0, **changes}), position)[0])


def test_a_draw_depends_on_seed_choice_and_position_alone():
    logits = np.random.default_rng(1).normal(size=300).astype(np.float32)

    def row(**changes: Any) -> tuple[int, ...]:
        return tuple(draw(logits, position, **changes) for position in range(8))

    assert row(seed=3) == row(seed=3)
    rows = {row(seed=3), row(seed=4), row(seed=3, choice=1), row(seed=3, choice=2), row(seed=1, choice=3)}
    assert len(rows) == 5
    assert len(set(row(seed=3))) > 4


def test_all_64_bits_of_a_seed_matter():
    logits = np.zeros(300, np.float32)
    seeds = (0, 1, 1 << 31, 1 << 32, (1 << 32) + 1, 1 << 63, (1 << 64) - 1, -2)
    assert len({tuple(draw(logits, position, seed=seed) for position in range(4)) for seed in seeds}) == len(seeds)


def test_noise_is_that_of_jax_random_keys():
    """fold_in(fold_in(key(seed), choice), position): the formula that design.md promises."""
    logits = np.random.default_rng(2).normal(size=64).astype(np.float32)
    for seed, choice, position in ((5, 0, 0), (5, 2, 77), (123456789, 1, 4000)):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), choice), position)
        noisy = logits / np.float32(0.7) + np.asarray(jax.random.gumbel(key, (64,)))
        token, gap = sample(jnp.asarray(logits), SamplingParams(0.7, seed=seed, choice=choice), position)
        best = np.sort(noisy)[::-1]
        assert int(token) == int(noisy.argmax())
        assert float(gap) == pytest.approx(float(best[0] - best[1]), abs=1e-5)


def test_gap_is_infinite_if_only_one_token_is_left():
    token, gap = sample(jnp.array([0.0, 1.0, 0.5]), SamplingParams(1.0, top_k=1), 0)
    assert int(token) == 1
    assert float(gap) == np.inf


@pytest.mark.parametrize(
    ("temperature", "options"), [(1.0, {}), (0.6, {"top_k": 6}), (1.7, {"top_p": 0.8, "min_p": 0.1})]
)
def test_frequencies(temperature, options):
    """Chi-square of 1500 draws against the reference distribution; the limit is exceeded by chance once in 10^5 runs."""
    logits = np.random.default_rng(3).normal(0, 1, 8).astype(np.float32)
    params = SamplingParams(temperature, seed=11, **options)
    count = 1500
    drawn = np.array([int(sample(jnp.asarray(logits), params, position)[0]) for position in range(count)])
    defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    allowed = sorted(reference_kept(logits, temperature, **{**defaults, **options}))
    assert set(drawn.tolist()) <= set(allowed)
    weights = np.exp(logits[allowed].astype(np.float64) / temperature)
    expected = count * weights / weights.sum()
    observed = np.array([(drawn == token).sum() for token in allowed])
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    limits = {3: 25.9, 4: 28.5, 5: 30.9, 6: 33.1, 7: 35.3}
    assert chi_square < limits[len(allowed) - 1]
