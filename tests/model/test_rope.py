"""Rotary frequencies equal transformers'; other types and wrong fields are errors."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pshare_jax.errors import PshareError
from pshare_jax.model.rope import KNOWN_TYPES, RopeConfig, parse_rope, rope_tables, rotate

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def parse(content: dict[str, Any], **changes: Any) -> RopeConfig:
    arguments: dict[str, Any] = {
        "old_theta_key": "rope_theta",
        "default_theta": 10000.0,
        "old_scaling": True,
        "per_layer_type": False,
    }
    return parse_rope(content, "full_attention", **{**arguments, **changes})


def theirs(head_dim: int, **rope: Any) -> np.ndarray:
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=rope)
    return LlamaRotaryEmbedding(config).inv_freq.numpy()


@pytest.mark.parametrize("head_dim", [16, 22, 128])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 12345.0},
        {"rope_type": "linear", "rope_theta": 777.0, "factor": 3.0},
        {**LLAMA3, "rope_theta": 500000.0, "original_max_position_embeddings": 32},
        {**LLAMA3, "rope_theta": 12345.0, "original_max_position_embeddings": 8192, "factor": 32.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_frequencies(rope, head_dim):
    ours = parse({"rope_parameters": rope}).inverse_frequencies(head_dim)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs(head_dim, **rope), rtol=1e-6)


def test_llama3_scales_long_wavelengths_only():
    rope = parse({"rope_parameters": {**LLAMA3, "rope_theta": 12345.0, "original_max_position_embeddings": 32}})
    plain = RopeConfig(12345.0).inverse_frequencies(64)
    ratio = plain / rope.inverse_frequencies(64)
    wavelength = 2 * math.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 32 / 4], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 32], 8.0, rtol=1e-6)
    between = ratio[(wavelength > 32 / 4) & (wavelength < 32)]
    assert len(between)
    assert np.all((between > 1) & (between < 8))


def test_llama3_defaults_to_the_context_length():
    content = {"rope_scaling": LLAMA3, "max_position_embeddings": 64}
    assert parse(content).original_max_len == 64
    with pytest.raises(PshareError, match="original_max_position_embeddings"):
        parse({"rope_scaling": LLAMA3})


def test_oldest_style():
    assert parse({"rope_theta": 7, "rope_scaling": {"type": "linear", "factor": 2}}) == RopeConfig(7.0, "linear", 2.0)
    local = parse(
        {"rope_local_base_freq": 9.0, "rope_scaling": {"type": "linear", "factor": 2}},
        old_theta_key="rope_local_base_freq",
        old_scaling=False,
        per_layer_type=False,
    )
    assert local == RopeConfig(9.0)


@pytest.mark.parametrize("name", ["nonsense", *sorted(set(ROPE_INIT_FUNCTIONS) - set(KNOWN_TYPES))])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_error_names_an_unknown_type(name, field, key):
    with pytest.raises(PshareError, match=f"'{name}'.*default, linear, llama3, yarn"):
        parse({field: {key: name, "factor": 2.0}, "max_position_embeddings": 64})


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "default", "rope_theta": "big"}, "rope_theta"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": "4"}, "factor"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({**LLAMA3, "low_freq_factor": None, "original_max_position_embeddings": 32}, "low_freq_factor"),
        ({**LLAMA3, "high_freq_factor": 1.0, "original_max_position_embeddings": 32}, "low_freq_factor"),
        ({**LLAMA3, "original_max_position_embeddings": "32"}, "original_max_position_embeddings"),
    ],
)
def test_error_names_a_wrong_number(rope, named):
    with pytest.raises(PshareError, match=named):
        parse({"rope_parameters": rope})


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 300))
def test_scores_depend_only_on_distance(first, second, shift):
    rope = RopeConfig(321.0)
    draw = np.random.default_rng(0)
    q, k = (jnp.asarray(draw.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(q_at: int, k_at: int) -> float:
        rotated = [rotate(x, *rope_tables(rope, 8, jnp.array([[at]]))) for x, at in ((q, q_at), (k, k_at))]
        return float((rotated[0] * rotated[1]).sum())

    assert abs(score(first, second) - score(first + shift, second + shift)) < 1e-3
