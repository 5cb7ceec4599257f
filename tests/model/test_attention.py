"""Dense attention against transformers' eager function and against itself in other shapes."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import assert_close
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from pshare_jax.model.attention import QUERY_BLOCK, attention, causal_attention, visible_keys

SIZES = {"B": 2, "N": 6, "K": 3, "H": 10}


def heads(seed: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q `[B, T, N, H]`, k and v `[B, K, T, H]`; no two sizes are equal."""
    B, N, K, H = SIZES.values()
    draw = np.random.default_rng(seed)
    shapes = (B, length, N, H), (B, K, length, H), (B, K, length, H)
    q, k, v = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)
    return q, k, v


def eager(q: Any, k: Any, v: Any, visible: np.ndarray, scale: float, softcap: float | None) -> Any:
    """transformers' attention: `[B, N, T, H]` queries, an additive mask."""
    module: Any = SimpleNamespace(num_key_value_groups=SIZES["N"] // SIZES["K"], training=False)
    mask = torch.where(torch.tensor(visible), 0.0, -torch.inf)[None, None]
    query, key, value = (torch.tensor(np.asarray(x)) for x in (q.swapaxes(1, 2), k, v))
    return eager_attention_forward(module, query, key, value, mask, scaling=scale, softcap=softcap)[0].numpy()


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_eager_attention(window, softcap):
    q, k, v = heads(0, 23)
    visible = np.array(visible_keys(jnp.arange(23), jnp.arange(23), window))
    expected = eager(q, k, v, visible, 0.37, softcap)
    assert_close(attention(q, k, v, jnp.asarray(visible), scale=0.37, softcap=softcap), expected, 1e-5)
    assert_close(causal_attention(q, k, v, window=window, scale=0.37, softcap=softcap), expected, 1e-5)


def test_window_counts_the_query_itself():
    visible = np.asarray(visible_keys(jnp.array([0, 4]), jnp.arange(6), 3))
    assert visible.tolist() == [[True] + [False] * 5, [False, False, True, True, True, False]]
    assert np.asarray(visible_keys(jnp.array([4]), jnp.arange(6), None)).tolist() == [[True] * 5 + [False]]


@pytest.mark.parametrize("length", [QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 2 * QUERY_BLOCK + 5])
@pytest.mark.parametrize("window", [None, 9, QUERY_BLOCK, QUERY_BLOCK + 1])
def test_blocks_of_queries_change_nothing(length, window):
    q, k, v = heads(1, length)
    positions = jnp.arange(length)
    whole = attention(q, k, v, visible_keys(positions, positions, window), scale=0.3, softcap=None)
    assert_close(causal_attention(q, k, v, window=window, scale=0.3, softcap=None), whole, 1e-5)


def test_large_scores_do_not_overflow():
    q, k, v = heads(2, 5)
    out = attention(q * 1e4, k * 1e4, v, visible_keys(jnp.arange(5), jnp.arange(5), None), scale=1.0, softcap=None)
    assert np.isfinite(np.asarray(out)).all()
    np.testing.assert_allclose(out[:, 0, ::2], v[:, :, 0], rtol=1e-6)


def test_undefined_slots_after_the_newest_token_are_never_read():
    """Values there may be anything finite: a weight of exactly zero is what the mask gives them."""
    q, k, v = heads(3, 12)
    visible = visible_keys(jnp.array([4]), jnp.arange(12), None)
    expected = attention(q[:, :1], k, v, visible, scale=1.0, softcap=None)
    k, v = k.at[:, :, 5:].set(1e30), v.at[:, :, 5:].set(-1e30)
    np.testing.assert_array_equal(attention(q[:, :1], k, v, visible, scale=1.0, softcap=None), expected)
