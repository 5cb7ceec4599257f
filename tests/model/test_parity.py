"""Logits equal transformers' for every family, in float32 to 1e-4, with unusual configs (cases A4-01, 05, 08, 10, 17)."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from reference import hf_logits, load_hf
from tiny import CLOSE, FAMILIES, assert_close, random_tokens, tiny_folder
from transformers.models.gemma3 import modeling_gemma3

import pshare_jax as ps
from pshare_jax.model.attention.dense import QUERY_BLOCK, fresh_attend
from pshare_jax.model.rope import RopeConfig

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 777.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 12345.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 3.5,
    "original_max_position_embeddings": 100,
    "beta_fast": 17,
    "beta_slow": 1.5,
    "rope_theta": 54321.0,
}
# Two layers (both kinds in Gemma 3) keep compilation short; T-gemma3's twelve layers are checked once.
FEW: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {}),
    "llama biases, untied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama head_dim 20, one kv head": ("llama", {"head_dim": 20, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "llama tied with biases": ("llama", {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR, "num_key_value_heads": 4}),
    "qwen3 untied": ("qwen3", {}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN, "max_position_embeddings": 320}),
    "qwen3 tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3 windows by depth": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3 windows by layer": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3 untied, biases": ("gemma3", {"tie_word_embeddings": False, "attention_bias": True}),
    "gemma3 odd scale, low cap": (
        "gemma3",
        {"query_pre_attn_scalar": 7, "final_logit_softcapping": 3.5, "num_key_value_heads": 1},
    ),
    "gemma3 no cap, window beyond a block": (
        "gemma3",
        {"final_logit_softcapping": None, "sliding_window": QUERY_BLOCK + 9, "head_dim": 16},
    ),
}


def pair(tmp_path: Path, family: str, **changes: Any) -> tuple[Any, ps.Model]:
    """A tiny model of few layers in transformers and, through its folder, here."""
    folder = tiny_folder(family, tmp_path / "model", std=0.1, **{**FEW[family], **changes})
    return load_hf(folder), ps.load(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(variant, tmp_path):
    family, changes = VARIANTS[variant]
    theirs, ours = pair(tmp_path, family, **changes)
    # More than one block of queries, and not whole blocks.
    tokens = random_tokens(0, 2, QUERY_BLOCK + 21)
    assert_close(ours.logits(tokens), hf_logits(theirs, tokens))


def test_window_is_ignored_if_the_config_disables_it(tmp_path):
    theirs, ours = pair(tmp_path, "qwen3", use_sliding_window=False, sliding_window=5, max_window_layers=1)
    assert all(layer.window is None for layer in ours.config.layers)
    tokens = random_tokens(0, 1, 40)
    assert_close(ours.logits(tokens), hf_logits(theirs, tokens))


def test_llama3_rope_at_every_band(tmp_path):
    """A4-05: a prompt far longer than original_max_position_embeddings."""
    theirs, ours = pair(tmp_path, "llama", rope_parameters=LLAMA3)
    tokens = random_tokens(1, 1, 200)
    expected, got = hf_logits(theirs, tokens), ours.logits(tokens)
    for position in (0, 40, 199):
        assert_close(got[:, position], expected[:, position])
    unscaled = hf_logits(load_hf(tiny_folder("llama", tmp_path / "unscaled", std=0.1, **FEW["llama"])), tokens)
    assert np.abs(unscaled - expected)[:, 199].max() > 0.01


def test_linear_rope_on_gemmas_global_layers_only(tmp_path):
    """A4-08: all twelve layers, from position 1 to 400, including the order of the best tokens."""
    theirs, ours = pair(tmp_path, "gemma3", num_hidden_layers=12, layer_types=None)
    assert [layer.rope.type for layer in ours.config.layers] == (["default"] * 5 + ["linear"]) * 2
    tokens = random_tokens(2, 1, 401)
    expected, got = hf_logits(theirs, tokens), np.asarray(ours.logits(tokens))
    assert_close(got, expected)
    for position in (1, 100, 400):
        assert list(np.argsort(-got[0, position])[:5]) == list(np.argsort(-expected[0, position])[:5])


def test_softcap_on_attention_scores(tmp_path, monkeypatch):
    """transformers' Gemma 3 ignores attn_logit_softcapping, so the test passes it to its eager function."""
    changes = {"attn_logit_softcapping": 0.7}
    theirs, ours = pair(tmp_path, "gemma3", **changes)
    tokens = random_tokens(3, 1, 150)
    uncapped = hf_logits(theirs, tokens)
    eager = modeling_gemma3.eager_attention_forward
    monkeypatch.setattr(
        modeling_gemma3, "eager_attention_forward", lambda *args, **kwargs: eager(*args, **{**kwargs, "softcap": 0.7})
    )
    theirs.config._attn_implementation = "eager"
    expected = hf_logits(theirs, tokens)
    assert np.abs(uncapped - expected).max() > 0.01
    assert_close(ours.logits(tokens), expected)


def logits_with(model: ps.Model, config: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits of the same weights with another config, without compiling for one use."""
    decoder = dataclasses.replace(model.architecture, config=config).bind(model.params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = decoder(jnp.asarray(tokens), positions, fresh_attend(config), ())
    return np.asarray(decoder.logits(hidden))


def first_layer(config: Any, **changes: Any) -> dict[str, Any]:
    return {"layers": (dataclasses.replace(config.layers[0], **changes), *config.layers[1:])}


FIELDS = {
    "norm_eps": lambda config: {"norm_eps": config.norm_eps * 3},
    "activation": lambda config: {"activation": "silu"},
    "attention_scale": lambda config: {"attention_scale": config.attention_scale * 1.1},
    "attention_softcap": lambda config: {"attention_softcap": 2.0},
    "final_softcap": lambda config: {"final_softcap": 2.0},
    "embed_scale": lambda config: {"embed_scale": config.embed_scale * 1.1},
    "norm_plus_one": lambda config: {"norm_plus_one": False},
    "window": lambda config: first_layer(config, window=config.layers[0].window + 1),
    "rope theta": lambda config: first_layer(config, rope=RopeConfig(config.layers[0].rope.theta * 1.1)),
    "rope type": lambda config: first_layer(config, rope=RopeConfig(config.layers[0].rope.theta, "linear", 1.1)),
}


def test_every_field_matters(tmp_path):
    """A slightly wrong field changes the logits by more than 20 times the tolerance."""
    layers = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    ours = ps.load(tiny_folder("gemma3", tmp_path, std=0.1, **layers))
    tokens = random_tokens(4, 1, 30)
    right = logits_with(ours, ours.config, tokens)
    assert_close(right, ours.logits(tokens))
    for name, change in FIELDS.items():
        wrong = logits_with(ours, dataclasses.replace(ours.config, **change(ours.config)), tokens)
        assert np.abs(wrong - right).max() > 20 * CLOSE, name


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_logits(family, tmp_path):
    """Prefill, one token, then several tokens give the logits of one forward pass."""
    theirs, ours = pair(tmp_path, family)
    shared = ps.factorize(ours)
    shared.add_task("base", "base")
    tokens = random_tokens(5, 2, 46)
    expected = hf_logits(theirs, tokens)
    kv = shared.transfer(shared.prefill(tokens[:, :40]))
    one, kv = shared.decode("base", tokens[:, 40:41], kv)
    several, kv = shared.decode("base", tokens[:, 41:], kv)
    assert kv.length == 46
    assert_close(np.concatenate([one, several], axis=1), expected[:, 40:])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family, tmp_path):
    """A4-17: both round differently; our distance from the float32 result must not be larger."""
    folder = tmp_path / "model"
    one_layer = {"num_hidden_layers": 1, **({"layer_types": None} if family == "gemma3" else {})}
    tiny_folder(family, folder, std=0.1, dtype=ml_dtypes.bfloat16, **one_layer)
    tokens = random_tokens(6, 2, 48)
    truth = hf_logits(load_hf(folder), tokens)
    theirs = hf_logits(load_hf(folder, torch.bfloat16), tokens)
    ours = ps.load(folder, dtype="bfloat16")
    shared = ps.factorize(ours)
    shared.add_task("base", "base")
    decoded, kv = shared.decode("base", tokens[:, 40:], shared.prefill(tokens[:, :40]))
    assert kv.layers[0][0].dtype == "bfloat16"
    for got, start in ((ours.logits(tokens), 0), (decoded, 40)):
        error, their_error = rms(got - truth[:, start:]), rms(theirs[:, start:] - truth[:, start:])
        assert error < 1.2 * their_error
        assert error < 0.03 * rms(truth)


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float32)))))
