"""Batched sampling equals a NumPy reference of the documented steps, and a row is independent of its batch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.sampling import sample as sample_module
from pshare_jax.sampling.params import SamplingParams, all_allowed, sampling_rows
from pshare_jax.sampling.sample import Adjustments, Sampled, sample, sample_rows

VOCAB = 37
YES, NO = np.array(True), np.array(False)
jitted = jax.jit(sample_rows)


def run(
    logits: np.ndarray,
    params: list[SamplingParams],
    positions: list[int] | None = None,
    adjustments: Adjustments | None = None,
    drawn: bool | None = None,
    logprobs: bool = False,
    masks: np.ndarray | None = None,
) -> Sampled:
    """The sampled rows as NumPy arrays; flags as the engine sets them."""
    rows = sampling_rows(params, positions or [0] * len(params), len(logits))
    zeros = Adjustments(np.zeros(logits.shape, np.float32), np.zeros(logits.shape, bool))
    needed = any(not row.is_greedy for row in params) if drawn is None else drawn
    flags = map(np.array, (needed, adjustments is not None, masks is not None, logprobs))
    given = adjustments or zeros, all_allowed(*logits.shape) if masks is None else masks
    return jax.tree.map(np.asarray, jitted(jnp.asarray(logits), rows, *given, *flags))


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Unusual values, each option often off."""
    return SamplingParams(
        temperature=float(rng.choice([0, 1e-6, 0.31, 0.9, 1.0, 2.7])),
        top_k=int(rng.choice([0, 0, 1, 5, 17, 1500])),
        top_p=float(rng.choice([1, 1, 0.93, 0.41, 0])),
        min_p=float(rng.choice([0, 0, 0.06, 0.4, 1])),
        seed=int(rng.integers(-(1 << 63), 1 << 63)),
        choice=int(rng.integers(0, 5)),
        repetition_penalty=float(rng.choice([1, 1, 1.3, 0.6])),
    )


def random_adjustments(rng: np.random.Generator, shape: tuple[int, int]) -> Adjustments:
    """Biases, bans (never of token 0) and repeated tokens."""
    bias = rng.choice([0, 0, 0.7, -1.3, -np.inf], shape).astype(np.float32)
    bias[:, 0] = 0
    return Adjustments(bias, rng.random(shape) < 0.4)


def random_masks(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Masks that allow few tokens, always token 0, or everything; bits beyond the vocabulary are set too."""
    masks = all_allowed(*shape)
    few = rng.random(len(masks)) < 0.6
    masks[few] &= rng.integers(-(1 << 31), 1 << 31, masks.shape, np.int32)[few]
    masks[:, 0] |= 1
    return masks


def allowed(masks: np.ndarray, size: int) -> np.ndarray:
    """The masks, one bool a token."""
    return np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")[:, :size].astype(bool)


def adjusted(logits: np.ndarray, penalty: float, bias: Any, repeated: Any) -> np.ndarray:
    """Steps 1 to 3 of `SamplingParams`, one token at a time."""
    scores = logits.astype(np.float64)
    for token in range(len(scores)):
        if repeated[token]:
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] += bias[token]
    return scores


def expected(scores: np.ndarray, params: SamplingParams, position: int) -> tuple[int, float] | None:
    """Step 4: the token and the gap between the two best scores; None if rounding would decide."""
    if params.temperature >= 1e-5:
        scores = scores / params.temperature
        order = np.argsort(-scores, kind="stable")[: params.top_k or None]
        weights = np.exp(scores[order] - scores[order[0]])
        limits = params.top_p * weights.sum(), params.min_p
        mass = np.cumsum(weights)
        if (params.top_p < 1 and np.any(np.abs(mass - limits[0]) < 1e-4)) or (
            0 < params.min_p < 1 and np.any(np.abs(weights - limits[1]) < 1e-4)
        ):
            return None
        allowed = np.full(len(scores), False)
        for rank, token in enumerate(order):
            in_nucleus = params.top_p == 1 or mass[rank] - weights[rank] < limits[0]
            allowed[token] = rank == 0 or (in_nucleus and weights[rank] >= limits[1])
        words = jnp.array([params.seed >> 32 & 0xFFFFFFFF, params.seed & 0xFFFFFFFF], jnp.uint32)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(words), params.choice), position)
        noise = np.asarray(jax.random.gumbel(key, (len(scores),)), np.float64)
        scores = np.where(allowed, scores, -np.inf) + noise
    best = np.argsort(-scores, kind="stable")
    gap = float(scores[best[0]] - scores[best[1]])
    return None if gap < 1e-4 else (int(best[0]), gap)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_equals_numpy(seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, rng.choice([0.5, 2, 6]), (5, VOCAB)).astype(np.float32)
    params = [random_params(rng) for _ in range(5)]
    positions = rng.integers(0, 4000, 5).tolist()
    changes = random_adjustments(rng, logits.shape)
    sampled = run(logits, params, positions, changes)
    for row in range(5):
        scores = adjusted(logits[row], params[row].repetition_penalty, changes.bias[row], changes.repeated[row])
        reference = expected(scores, params[row], positions[row])
        if reference is not None:
            assert int(sampled.ids[row]) == reference[0]
            assert float(sampled.gaps[row]) == pytest.approx(reference[1], rel=1e-5, abs=2e-5)


def assert_same(one: Sampled, other: Sampled) -> None:
    """Equal to the last bit."""
    for name, left, right in zip(Sampled._fields, one, other, strict=True):
        assert left.tobytes() == right.tobytes(), name


# Fewer than the top tokens; where a CPU uses another loop for few rows than for many; more than the best 1024.
@pytest.mark.parametrize("size", [2, 321, 3000])
def test_a_row_depends_on_neither_neighbours_nor_batch_size(size):
    rng = np.random.default_rng(size)
    count = 17
    logits = rng.normal(0, rng.choice([0.3, 1, 3, 8], (count, 1)), (count, size)).astype(np.float32)
    logits[:, : size // 3] = np.round(logits[:, : size // 3])  # ties, and zeros of both signs
    params = [random_params(rng) for _ in range(count)]
    positions = rng.integers(0, 4000, count).tolist()
    changes, masks = random_adjustments(rng, logits.shape), random_masks(rng, logits.shape)

    def picked(rows: np.ndarray) -> Sampled:
        part = Adjustments(changes.bias[rows], changes.repeated[rows])
        params_of, positions_of = [params[i] for i in rows], [positions[i] for i in rows]
        return run(logits[rows], params_of, positions_of, part, drawn=True, logprobs=True, masks=masks[rows])

    everything = picked(np.arange(count))
    for num_rows in (1, 3, 8):
        rows = rng.choice(count, num_rows, replace=False)
        assert_same(picked(rows), Sampled(*(field[rows] for field in everything)))


def test_a_row_without_options_is_unchanged_by_a_row_with_them():
    """The flags apply to the whole batch: a row has the same result with and without each of them."""
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (2, 1500)).astype(np.float32)
    logits[0] = -np.abs(logits[0]) - 0.01
    logits[0, 2:6] = [-0.0, 0.0, -0.0, 0.0]  # the best four, of which the first is chosen
    busy = SamplingParams(1.9, top_p=0.99, repetition_penalty=1.4)
    bias, repeated = np.zeros(logits.shape, np.float32), np.zeros(logits.shape, bool)
    bias[1, 5], repeated[1, :700] = -np.inf, True
    changes, masks = Adjustments(bias, repeated), all_allowed(*logits.shape)
    masks[1] = 0b10110
    for plain in (SamplingParams(), SamplingParams(0.8, seed=5), SamplingParams(0.8, top_p=0.3, seed=5)):
        alone = run(logits[:1], [plain], [7])
        beside = run(logits, [plain, busy], [7, 9], changes, logprobs=True, masks=masks)
        assert alone.ids[0] == beside.ids[0]
        assert alone.gaps[0].tobytes() == beside.gaps[0].tobytes()


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1500])
def test_a_mask_is_a_ban(size):
    """The same tokens, gaps and logprobs as with a bias of -inf where the mask's bit is 0."""
    rng = np.random.default_rng(size)
    for _ in range(4):
        logits = rng.normal(0, 2, (6, size)).astype(np.float32)
        params, masks = [random_params(rng) for _ in range(6)], random_masks(rng, logits.shape)
        changes = random_adjustments(rng, logits.shape)
        masked = run(logits, params, adjustments=changes, logprobs=True, masks=masks)
        bans = np.where(allowed(masks, size), 0, -np.inf).astype(np.float32)
        banned = run(logits, params, adjustments=changes._replace(bias=changes.bias + bans), logprobs=True)
        assert_same(masked, banned)
        assert allowed(masks, size)[range(6), masked.ids].all()


def test_a_large_nucleus_in_one_row_does_not_change_others():
    """One row with a flat distribution makes the batch sort everything; the best 1024 tokens suffice for the others."""
    rng = np.random.default_rng(4)
    logits = rng.normal(0, [[8], [0.1]], (2, 4000)).astype(np.float32)
    each: tuple[dict[str, Any], ...] = (
        {"top_p": 0.97},
        {"top_k": 900, "top_p": 0.5},
        {"min_p": 0.01},
        {"top_k": 3000, "top_p": 0.9},
    )
    for options in each:
        for position in range(10):
            params = [SamplingParams(1.1, seed=1, **options), SamplingParams(1.0, seed=2, top_p=0.999)]
            both = run(logits, params, [position] * 2)
            for row in range(2):
                one = run(logits[row : row + 1], params[row : row + 1], [position])
                assert (one.ids[0], one.gaps[0]) == (both.ids[row], both.gaps[row])


def test_single_rows_equal_batched_rows():
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (12, VOCAB)).astype(np.float32)
    params = [random_params(rng) for _ in range(12)]
    changes = random_adjustments(rng, logits.shape)
    sampled = run(logits, params, list(range(12)), changes, logprobs=True)
    for row in range(12):
        own = Adjustments(changes.bias[row : row + 1], changes.repeated[row : row + 1])
        token, gap = sample(jnp.asarray(logits[row]), params[row], row, own)
        assert (int(token), float(gap)) == (int(sampled.ids[row]), float(sampled.gaps[row]))


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.85}])
def test_frequencies_with_penalties(options: dict[str, Any]):
    """Chi-square of 4000 draws; the limit is exceeded by chance once in 10^5 runs."""
    count, size = 4000, 8
    logits = np.random.default_rng(6).normal(0, 1, size).astype(np.float32)
    bias, repeated = np.array([0, 0.5, 2.3, -np.inf, 0, 0.2, 0, -0.4], np.float32), np.arange(size) % 2 == 0
    params = SamplingParams(0.9, seed=3, repetition_penalty=1.5, **options)
    changes = Adjustments(np.tile(bias, (count, 1)), np.tile(repeated, (count, 1)))
    drawn = run(np.tile(logits, (count, 1)), [params] * count, list(range(count)), changes).ids
    scores = adjusted(logits, 1.5, bias, repeated) / 0.9
    order = np.argsort(-scores)[: params.top_k or 7]
    weights = np.exp(scores[order] - scores[order[0]])
    inside = np.cumsum(weights) - weights < params.top_p * weights.sum()
    order, weights = order[inside], weights[inside]
    assert set(drawn.tolist()) == set(order.tolist())
    shares = count * weights / weights.sum()
    assert shares.min() > 20
    observed = np.array([(drawn == token).sum() for token in order])
    limits = {2: 23.1, 3: 25.9, 4: 28.5, 5: 30.9, 6: 33.1}
    assert float(((observed - shares) ** 2 / shares).sum()) < limits[len(order) - 1]


@pytest.mark.parametrize("size", [1, 2, 7, 20, 21, 3000])
def test_logprobs_are_of_the_raw_logits(size):
    rng = np.random.default_rng(size)
    logits = rng.normal(0, 9, (4, size)).astype(np.float32)
    params = [SamplingParams(), SamplingParams(2.5, top_k=2, seed=1), SamplingParams(0.2), SamplingParams()]
    sampled = run(logits, params, adjustments=random_adjustments(rng, logits.shape), logprobs=True)
    raw = logits.astype(np.float64)
    reference = raw - raw.max(-1, keepdims=True)
    reference -= np.log(np.exp(reference).sum(-1, keepdims=True))
    best = np.argsort(-raw, axis=-1, kind="stable")[:, :20]
    np.testing.assert_array_equal(sampled.top_ids, best)
    np.testing.assert_allclose(sampled.top_logprobs, np.take_along_axis(reference, best, -1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(sampled.logprobs, reference[np.arange(4), sampled.ids], rtol=0, atol=1e-5)


def test_logprobs_are_zeros_unless_requested():
    sampled = run(np.random.default_rng(1).normal(size=(2, 7)).astype(np.float32), [SamplingParams()] * 2)
    assert not sampled.logprobs.any()
    assert not sampled.top_ids.any()
    assert not sampled.top_logprobs.any()
    assert sampled.top_ids.shape == sampled.top_logprobs.shape == (2, 7)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.3}])
def test_all_banned_but_one(temperature, options: dict[str, Any]):
    logits = np.random.default_rng(2).normal(0, 3, (3, VOCAB)).astype(np.float32)
    bias = np.full(logits.shape, -np.inf, np.float32)
    left = [int(logits[0].argmin()), 0, VOCAB - 1]
    bias[range(3), left] = -50.0
    params = [SamplingParams(temperature, seed=row, **options) for row in range(3)]
    sampled = run(logits, params, adjustments=Adjustments(bias, np.zeros(logits.shape, bool)), logprobs=True)
    assert sampled.ids.tolist() == left
    assert np.isposinf(sampled.gaps).all()
    assert np.isfinite(sampled.logprobs).all()


def test_inputs_are_ignored_without_their_flag():
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(2, VOCAB)).astype(np.float32)
    garbage = Adjustments(np.full(logits.shape, np.nan, np.float32), np.ones(logits.shape, bool))
    rows = sampling_rows([SamplingParams(1.0, repetition_penalty=9.0, seed=1), SamplingParams()], [0, 0], 2)
    nothing = np.zeros_like(all_allowed(*logits.shape))
    greedy = jitted(jnp.asarray(logits), rows, garbage, nothing, NO, NO, NO, NO)
    assert np.asarray(greedy.ids).tolist() == logits.argmax(-1).tolist()


def test_one_compile_for_each_batch_size():
    traced = []

    @jax.jit
    def function(*arguments: Any) -> Sampled:
        traced.append(arguments[0].shape)
        return sample_rows(*arguments)

    for num_rows in (1, 3):
        logits = jnp.asarray(np.random.default_rng(8).normal(size=(num_rows, VOCAB)), jnp.float32)
        changes = Adjustments(jnp.zeros(logits.shape), jnp.zeros(logits.shape, bool))
        for flags in np.ndindex(2, 2, 2, 2):
            for params in ([], [SamplingParams(0.5, 3, 0.5, 0.1, -1)]):
                rows = sampling_rows(params, [5] * len(params), num_rows)
                function(logits, rows, changes, all_allowed(*logits.shape), *(np.array(bool(flag)) for flag in flags))
    assert traced == [(1, VOCAB), (3, VOCAB)]


def test_top_k_compiles_to_no_sort():
    """On a CPU a sort of a real vocabulary takes 10 ms per row; the compiler falls back to it unless prevented."""
    logits, limits = jnp.zeros((2, 15000)), (jnp.array([0, 2000]), jnp.array([0.9, 0.9]), jnp.zeros(2))
    for function in (
        sample_module._best,
        lambda x: sample_module.best_logprobs(x, jnp.zeros(2, jnp.int32)),
        lambda x: sample_module.kept(x, *limits),
    ):
        program = jax.jit(function).lower(logits).compile().as_text()
        assert program is not None
        assert "TopK" in program
        # The few best blocks are sorted by their ids.
        sorted_sizes = [int(size) for size in re.findall(r"\[(?:\d+,)*(\d+)\]\S* sort\(", program)]
        assert len(sorted_sizes) == program.count(" sort(")
        assert all(size <= sample_module.FEW_BLOCKS for size in sorted_sizes)
