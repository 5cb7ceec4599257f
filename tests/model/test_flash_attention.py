"""Attention in blocks with gradients: dense attention's values and gradients, for all sights, and blocks that are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.mesh import make_mesh
from pshare_jax.model.attention import flash
from pshare_jax.model.attention.flash import Keys, KeySet, Queries, Scoring, flash_attention

B, T, S, N, K, H = 2, 37, 53, 6, 2, 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(flash, "QUERY_BLOCK", 16)
    monkeypatch.setattr(flash, "KEY_BLOCK", 8)


def packed_marks(draw, length, groups):
    """Groups in order, then padding, with positions within each."""
    cuts = np.sort(draw.choice(np.arange(1, length), (B, groups), replace=False), axis=1)
    marks = np.stack([np.searchsorted(row, np.arange(length), side="right") + 1 for row in cuts])
    marks = np.where(marks > groups, 0, marks)
    positions = np.stack([[int((row[:i] == row[i]).sum()) for i in range(length)] for row in marks])
    return jnp.asarray(marks, jnp.int32), jnp.asarray(positions, jnp.int32)


def case(seed, dtype="float32"):
    """A set of another stream, whose prefixes queries see, and the queries' own."""
    draw = np.random.default_rng(seed)
    groups, positions = packed_marks(draw, T, 3)
    old_groups, old_positions = packed_marks(draw, S, 3)
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    prefix = jnp.asarray(draw.integers(0, 20, (B, T)), jnp.int32)

    def values(*shape):
        return jnp.asarray(draw.normal(size=shape), dtype)

    old = KeySet(
        values(B, K, S, H),
        values(B, K, S, H),
        Keys(old_groups, old_positions, old_positions),
        Queries(groups, prefix, positions + 9),
    )
    own = KeySet(
        values(B, K, T, H),
        values(B, K, T, H),
        Keys(groups, index, positions + 9),
        Queries(groups, index, positions + 9),
    )
    return values(B, T, N, H), old, own


def visible(keys: KeySet, window):
    queries = [x[:, :, None] for x in keys.queries]
    groups, orders, positions = (x[:, None] for x in keys.keys)
    near = True if window is None else queries[2] - positions < window
    return (groups == queries[0]) & (groups > 0) & (orders <= queries[1]) & near


def reference(scoring, q, old, own):
    """Softmax over all visible keys at once; 0 where a query sees none."""
    k, v = (jnp.repeat(jnp.concatenate(parts, axis=2), N // K, axis=1) for parts in ((old.k, own.k), (old.v, own.v)))
    scores = jnp.einsum("BTNH,BNSH->BNTS", q, k) * scoring.scale
    scores = scores if scoring.softcap is None else scoring.softcap * jnp.tanh(scores / scoring.softcap)
    see = jnp.concatenate([visible(x, scoring.window) for x in (old, own)], axis=2)[:, None]
    weights = jax.nn.softmax(jnp.where(see, scores, -1e30), axis=-1) * see
    return jnp.einsum("BNTS,BNSH->BTNH", weights, v)


def ours(scoring, q, old, own, mesh=None, axes=()):
    return flash_attention(q, (old,), (own,), scoring, mesh or make_mesh([0]), axes)


def slopes(attend, scoring, q, old, own):
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=q.shape), q.dtype)

    def total(q, k, v, old_k):
        out = attend(scoring, q, old._replace(k=old_k), own._replace(k=k, v=v))
        return (out * cotangent).sum().astype(jnp.float32)

    return jax.grad(total, argnums=(0, 1, 2, 3))(q, own.k, own.v, old.k)


@pytest.mark.parametrize("window", [None, 5, 1])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_and_gradients_are_those_of_one_softmax(window, softcap):
    scoring, arrays = Scoring(0.3, softcap, window), case(1)
    np.testing.assert_allclose(ours(scoring, *arrays), reference(scoring, *arrays), atol=2e-6)
    found, wanted = slopes(ours, scoring, *arrays), slopes(reference, scoring, *arrays)
    for mine, theirs in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=5e-6)
    # The set that is not trained has none.
    assert not found[3].any()
    assert wanted[3].any()


def test_bfloat16_products_are_of_bfloat16():
    """Scores are summed in float32; no product has a float32 and a bfloat16 factor, which would be one of float32."""
    scoring, (q, old, own) = Scoring(0.3, None, None), case(3, "bfloat16")
    text = jax.jit(lambda *x: slopes(ours, scoring, *x)).lower(q, old, own).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    # Two of each set in the first pass; in the second three, and two more for the set that is trained.
    assert len(products) == 2 + 2 + 3 + 5
    assert all(line.rsplit(":", 1)[1].count("xbf16>") == 2 for line in products)
    found, wanted = slopes(ours, scoring, q, old, own), slopes(ours, scoring, *case(3))
    for mine, theirs in zip(found[:3], wanted[:3], strict=True):
        assert np.abs(np.asarray(mine, np.float32) - theirs).max() < 0.03 * np.abs(theirs).max()


def test_rows_on_devices_of_their_own_give_the_same():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    scoring, arrays = Scoring(0.3, None, 7), case(4)

    def on_two(scoring, *arrays):
        return ours(scoring, *arrays, mesh=mesh, axes=("data",))

    found = jax.jit(lambda *x: slopes(on_two, scoring, *x))(*arrays)
    for mine, theirs in zip(found, slopes(ours, scoring, *arrays), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def marks(groups, positions):
    return jnp.asarray(groups, jnp.int32)[None], jnp.asarray(positions, jnp.int32)[None]


@pytest.mark.parametrize(
    ("groups", "window", "spans"),
    [
        # Causal: a block of 16 queries sees the blocks of 8 keys up to its end.
        ([1] * 48, None, [(0, 2), (0, 4), (0, 6)]),
        # A window of 4: only the block before is left.
        ([1] * 48, 4, [(0, 2), (1, 4), (3, 6)]),
        # Samples of 16 tokens: each block sees its own.
        ([1] * 16 + [2] * 16 + [3] * 16, None, [(0, 2), (2, 4), (4, 6)]),
        # Padding sees nothing.
        ([1] * 16 + [0] * 32, None, [(0, 2), (0, 0), (0, 0)]),
    ],
)
def test_blocks_that_nothing_sees_are_skipped(groups, window, spans):
    groups, index = marks(groups, range(48))
    queries, keys = Queries(groups, index, index), Keys(groups, index, index)
    found = flash._spans(flash._Sight(flash._in_blocks(queries, 16), keys), window)
    assert [tuple(span) for span in found.tolist()] == spans


def test_no_visible_key_lies_outside_a_span():
    for seed in range(20):
        _, old, own = case(seed)
        for sets in (old, own):
            for window in (None, 3):
                padded = flash._padded(sets)
                sight = flash._Sight(flash._in_blocks(sets.queries, 13), padded.keys)
                size = flash._block_size(padded.k.shape[2], flash.KEY_BLOCK)
                seen = np.any(np.asarray(visible(sets, window)), axis=0)
                for number, (first, stop) in enumerate(flash._spans(sight, window).tolist()):
                    keys = np.flatnonzero(seen[number * 13 : (number + 1) * 13].any(0)) // size
                    assert not len(keys) or (first <= keys.min() and keys.max() < stop)


def test_a_program_does_not_grow_with_the_lengths():
    def lines(length):
        groups, index = jnp.ones((1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None]
        zeros = jnp.zeros((1, K, length, H))
        own = KeySet(zeros, zeros, Keys(groups, index, index), Queries(groups, index, index))

        def total(q):
            return flash_attention(q, (), (own,), Scoring(1.0, None, None), make_mesh([0]), ()).sum()

        return len(jax.jit(jax.grad(total)).lower(jnp.zeros((1, length, N, H))).as_text().splitlines())

    assert lines(256) == lines(64)
