"""transformers loads a saved folder with equal logits, and `load` returns the same model."""

import json

import jax
import numpy as np
import pytest
from reference import hf_logits, load_hf
from safetensors.numpy import load_file
from tiny import assert_close, random_tokens, tiny_folder
from transformers import AutoTokenizer

import pshare_jax as ps
from pshare_jax.share.save import hf_config
from pshare_jax.weights.safetensors import SINGLE_FILE, write_safetensors

GEMMA_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
VARIANTS = {
    "llama tied": ("llama", {}),
    "llama untied, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "qwen3 untied": ("qwen3", {"num_hidden_layers": 2}),
    "qwen3 tied, windows": (
        "qwen3",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "gemma3": ("gemma3", GEMMA_LAYERS),
    "gemma3 untied, biases": ("gemma3", {**GEMMA_LAYERS, "attention_bias": True, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tmp_path):
    family, changes = VARIANTS[variant]
    source = tiny_folder(family, tmp_path / "source", std=0.1, **changes)
    model = ps.load(source)
    ps.save_folder(tmp_path / "saved", model)
    tokens = random_tokens(0, 1, 30)
    expected = hf_logits(load_hf(source), tokens)
    # The same weights in the same library give identical logits.
    np.testing.assert_array_equal(hf_logits(load_hf(tmp_path / "saved"), tokens), expected)
    assert_close(model.logits(tokens), expected)

    again = ps.load(tmp_path / "saved")
    assert again.fingerprint == model.fingerprint
    assert again.config == model.config
    assert again.stop_ids == model.stop_ids
    assert again.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert again.tokenizer.template_fingerprint == model.tokenizer.template_fingerprint
    for path, array in model.params.items():
        np.testing.assert_array_equal(again.params[path], array)


def test_content_of_the_folder(tmp_path):
    source = tiny_folder("llama", tmp_path / "source")
    model = ps.load(source)
    ps.save_folder(tmp_path / "deep" / "saved", model)
    saved = tmp_path / "deep" / "saved"
    tensors = load_file(saved / SINGLE_FILE)
    assert "lm_head.weight" not in tensors
    assert set(tensors) == set(load_file(source / SINGLE_FILE))
    content = json.loads((saved / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLM"]
    assert content["dtype"] == "float32"
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == sorted(model.stop_ids)
    text = "Hello there"
    assert AutoTokenizer.from_pretrained(saved).encode(text) == model.tokenizer.encode(text)


def test_bfloat16(tmp_path):
    model = ps.load(tiny_folder("qwen3", tmp_path / "source", num_hidden_layers=1), dtype="bfloat16")
    ps.save_folder(tmp_path / "saved", model)
    assert {str(x.dtype) for x in load_file(tmp_path / "saved" / SINGLE_FILE).values()} == {"bfloat16"}
    assert hf_config(model.hf_config, model.architecture)["dtype"] == "bfloat16"
    again = ps.load(tmp_path / "saved", dtype="bfloat16")
    for path, array in model.params.items():
        np.testing.assert_array_equal(np.asarray(again.params[path]), np.asarray(array))


def test_head_that_differs_from_a_tied_config_is_kept(tmp_path):
    source = tiny_folder("llama", tmp_path / "source", num_hidden_layers=1)
    tensors = load_file(source / SINGLE_FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_safetensors(source, tensors.items())
    with pytest.warns(UserWarning, match=r"lm_head\.weight"):
        model = ps.load(source)
    ps.save_folder(tmp_path / "saved", model)
    again = ps.load(tmp_path / "saved")
    assert again.fingerprint == model.fingerprint
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is False


def test_sharded_over_devices(tmp_path):
    source = tiny_folder("llama", tmp_path / "source", num_hidden_layers=1)
    model = ps.load(source, mesh=ps.make_mesh([0, 1, 2, 3]))
    ps.save_folder(tmp_path / "saved", model)
    expected = load_file(source / SINGLE_FILE)
    for name, values in load_file(tmp_path / "saved" / SINGLE_FILE).items():
        np.testing.assert_array_equal(values, expected[name])


def test_saving_changes_nothing(tmp_path):
    """Invariant 6: the parameters are bit-identical afterwards and still usable."""
    model = ps.load(tiny_folder("llama", tmp_path / "source", num_hidden_layers=1))
    before = jax.tree.map(np.array, model.params)
    ps.save_folder(tmp_path / "saved", model)
    for path, array in model.params.items():
        np.testing.assert_array_equal(array, before[path])
