"""Dense attention equals transformers' eager function, and itself in other shapes."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny import assert_close
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from pshare_jax.model.attention.dense import QUERY_BLOCK, Segment, attention, causal_attention, visible_keys

SIZES = {"B": 2, "N": 6, "K": 3, "H": 10}


def heads(seed: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q `[B, T, N, H]`, k and v `[B, K, T, H]`; all sizes differ."""
    B, N, K, H = SIZES.values()
    draw = np.random.default_rng(seed)
    shapes = (B, length, N, H), (B, K, length, H), (B, K, length, H)
    q, k, v = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v


def eager(q: Any, k: Any, v: Any, visible: np.ndarray, scale: float, softcap: float | None) -> Any:
    """transformers' attention, with `[B, N, T, H]` queries and an additive mask."""
    module: Any = SimpleNamespace(num_key_value_groups=SIZES["N"] // SIZES["K"], training=False)
    mask = torch.where(torch.tensor(visible), 0.0, -torch.inf)[None, None]
    query, key, value = (torch.tensor(np.asarray(x)) for x in (q.swapaxes(1, 2), k, v))
    return eager_attention_forward(module, query, key, value, mask, scaling=scale, softcap=softcap)[0].numpy()


def single_segment(q: Any, k: Any, v: Any, visible: Any, scale: float = 0.3, softcap: float | None = None) -> jax.Array:
    """Our attention over one segment."""

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
        return attention(q, [Segment(k, v, visible)], scale=scale, softcap=softcap)

    return attend(q, k, v, jnp.asarray(visible))


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_eager_attention(window, softcap):
    q, k, v = heads(0, 23)
    visible = np.array(visible_keys(jnp.arange(23), jnp.arange(23), window))
    expected = eager(q, k, v, visible, 0.37, softcap)
    assert_close(single_segment(q, k, v, visible, 0.37, softcap), expected, 1e-5)
    assert_close(causal_attention(q, k, v, window=window, scale=0.37, softcap=softcap), expected, 1e-5)


@pytest.mark.parametrize("cut", [1, 9, 22])
def test_segments_share_one_softmax(cut):
    q, k, v = heads(4, 23)
    visible = visible_keys(jnp.arange(23), jnp.arange(23), 12)
    segments = [Segment(k[:, :, part], v[:, :, part], visible[:, part]) for part in (slice(cut), slice(cut, None))]
    assert_close(attention(q, segments, scale=0.3, softcap=2.0), single_segment(q, k, v, visible, 0.3, 2.0), 1e-6)


def test_window_counts_the_query_itself():
    visible = np.asarray(visible_keys(jnp.array([0, 4]), jnp.arange(6), 3))
    assert visible.tolist() == [[True] + [False] * 5, [False, False, True, True, True, False]]
    assert np.asarray(visible_keys(jnp.array([4]), jnp.arange(6), None)).tolist() == [[True] * 5 + [False]]


@pytest.mark.parametrize("length", [QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 5])
@pytest.mark.parametrize("window", [None, 9, QUERY_BLOCK + 1])
def test_blocks_of_queries_do_not_change_the_result(length, window):
    q, k, v = heads(1, length)
    positions = jnp.arange(length)
    whole = single_segment(q, k, v, visible_keys(positions, positions, window))
    in_blocks = jax.jit(partial(causal_attention, window=window, scale=0.3, softcap=None))
    assert_close(in_blocks(q, k, v), whole, 1e-5)


def test_large_scores_do_not_overflow():
    q, k, v = heads(2, 5)
    out = single_segment(q * 1e4, k * 1e4, v, visible_keys(jnp.arange(5), jnp.arange(5), None))
    assert np.isfinite(np.asarray(out)).all()
    np.testing.assert_allclose(out[:, 0, ::2], v[:, :, 0], rtol=1e-6)


def test_slots_after_the_newest_token_have_zero_weight():
    q, k, v = heads(3, 12)
    visible = visible_keys(jnp.array([4]), jnp.arange(12), None)
    expected = single_segment(q[:, :1], k, v, visible)
    k, v = k.at[:, :, 5:].set(1e30), v.at[:, :, 5:].set(-1e30)
    np.testing.assert_array_equal(single_segment(q[:, :1], k, v, visible), expected)
