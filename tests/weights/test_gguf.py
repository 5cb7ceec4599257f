"""GGUF files are read as the Hugging Face models that they were written from."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pshare_jax.errors import PshareError
from pshare_jax.model.config import ModelConfig
from pshare_jax.weights.gguf import GGUFFile
from pshare_jax.weights.gguf_config import llama3_scaling

MODELS = ["llama", "llama-biases", "qwen3", "gemma3"]


def rebuilt(checkpoint):
    """A transformers model of the checkpoint's config and tensors."""
    config = AutoConfig.for_model(**dict(checkpoint.config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = {name: torch.from_numpy(checkpoint.read(name).astype(np.float32)) for name in checkpoint.names()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_tensors_round_trip(name, tiny_model, write_tiny):
    checkpoint = GGUFFile(write_tiny(name))
    state = tiny_model(name).state_dict()
    if checkpoint.config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    assert sorted(checkpoint.names()) == sorted(state)
    for key, value in state.items():
        read = checkpoint.read(key)
        assert checkpoint.shape(key) == read.shape == tuple(value.shape)
        # Adding and subtracting 1 rounds the last bits of Gemma's norms.
        plus_one = name == "gemma3" and key.endswith("norm.weight")
        np.testing.assert_allclose(read, value.numpy(), rtol=0, atol=1e-6 if plus_one else 0, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_config_and_tensors_make_the_same_model(name, tiny_model, write_tiny):
    model, again = tiny_model(name), rebuilt(GGUFFile(write_tiny(name)))
    tokens = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_config_fields_equal_the_original(name, tiny_model, write_tiny):
    checkpoint = GGUFFile(write_tiny(name))
    original = tiny_model(name).config.to_dict()
    again = AutoConfig.for_model(**dict(checkpoint.config)).to_dict()
    differing = {key for key in original | again if original.get(key) != again.get(key)}
    assert differing <= {"dtype", "transformers_version", "use_cache", "architectures", "pad_token_id"}
    assert checkpoint.generation_config == {}


@pytest.mark.parametrize("name", MODELS)
def test_layers_read_the_same_config_from_gguf_and_folder(name, tiny_model, write_tiny):
    """The base fingerprint does not depend on the file format."""
    original = json.loads(json.dumps(tiny_model(name).config.to_dict()))
    ours = ModelConfig.from_hf(GGUFFile(write_tiny(name)).config)
    assert ours.layer_fields() == ModelConfig.from_hf(original).layer_fields()
    assert ours.max_len == 512


def test_real_model(smollm2_gguf):
    checkpoint = GGUFFile(smollm2_gguf)
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert checkpoint.config["rope_theta"] == 100000.0
    assert (checkpoint.config["num_attention_heads"], checkpoint.config["num_key_value_heads"]) == (9, 3)
    assert checkpoint.config["tie_word_embeddings"] is True
    assert len(checkpoint.names()) == 272
    assert checkpoint.shape("model.layers.29.mlp.down_proj.weight") == (576, 1536)
    assert np.isfinite(checkpoint.read("model.layers.29.self_attn.k_proj.weight")).all()


def test_tokenizer_gets_plain_values(write_tiny, monkeypatch):
    seen = []

    def from_gguf(cls, fields):
        seen.append(fields)
        return object.__new__(cls)

    monkeypatch.setattr("pshare_jax.weights.gguf.Tokenizer.from_gguf", classmethod(from_gguf))
    GGUFFile(write_tiny("llama", {"tokenizer.ggml.scores": [0.5, -1.0]})).tokenizer()
    assert seen[0] == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(64)],
        "tokenizer.ggml.token_type": [1] * 64,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.scores": [0.5, -1.0],
    }


def test_half_precision_stays_as_stored(write_tiny, write_embedding):
    from gguf import GGMLQuantizationType

    path = write_tiny("llama", tensors={"blk.0.attn_v.weight": np.full((16, 32), 0.5, np.float16)})
    assert GGUFFile(path).read("model.layers.0.self_attn.v_proj.weight").dtype == np.float16
    assert GGUFFile(path).read("model.layers.1.self_attn.v_proj.weight").dtype == np.float32

    values = np.linspace(-2, 2, 64 * 32).reshape(64, 32).astype(ml_dtypes.bfloat16)
    path = write_embedding(values.view(np.uint8), GGMLQuantizationType.BF16)
    checkpoint = GGUFFile(path)
    read = checkpoint.read("model.embed_tokens.weight")
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read, values)
    # Defaults: as many key/value heads as heads, and a head size of embedding / heads.
    assert (checkpoint.config["num_key_value_heads"], checkpoint.config["head_dim"]) == (4, 8)


def test_gemma_half_precision_norms(write_tiny):
    path = write_tiny("gemma3", tensors={"output_norm.weight": np.full(32, 1.25, np.float16)})
    read = GGUFFile(path).read("model.norm.weight")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, 0.25)


def test_end_of_turn_token(write_tiny):
    checkpoint = GGUFFile(write_tiny("gemma3", {"tokenizer.ggml.eot_token_id": 7}))
    assert checkpoint.config["eos_token_id"] == 2
    assert checkpoint.generation_config == {"eos_token_id": [2, 7]}


def test_gemma_without_the_newer_keys_uses_the_fixed_pattern(write_tiny):
    absent = {"gemma3.attention.sliding_window_pattern": None, "gemma3.rope.freq_base_swa": None}
    config = GGUFFile(write_tiny("gemma3", absent)).config
    assert config["layer_types"] == ["sliding_attention"] * 3
    assert config["rope_local_base_freq"] == 10000.0
    assert GGUFFile(write_tiny("gemma3", {"gemma3.attention.sliding_window_pattern": 2})).config["layer_types"] == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    config = GGUFFile(write_tiny("gemma3", {"gemma3.attention.sliding_window": None})).config
    assert (config["layer_types"], config["sliding_window"]) == (["full_attention"] * 3, None)


def test_gemma_attention_scale(write_tiny):
    """llama.cpp recognises 27B by its 62 layers; only that size scales by embedding / heads."""
    keys = {"gemma3.attention.sliding_window_pattern": None}
    assert GGUFFile(write_tiny("gemma3", keys)).config["query_pre_attn_scalar"] == 12
    assert GGUFFile(write_tiny("gemma3", keys | {"gemma3.block_count": 62})).config["query_pre_attn_scalar"] == 8


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({}, None),
        ({"llama.rope.scaling.type": "none"}, None),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0}, None),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
            {"rope_type": "linear", "factor": 2.5},
        ),
        ({"llama.rope.scale_linear": 3.0}, {"rope_type": "linear", "factor": 3.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
                "llama.rope.scaling.yarn_ext_factor": 1.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)
def test_rope_scaling(keys, scaling, write_tiny):
    assert GGUFFile(write_tiny("llama", keys)).config.get("rope_scaling") == scaling


@pytest.mark.parametrize("key", ["attn_factor", "yarn_attn_factor", "yarn_ext_factor", "yarn_log_multiplier"])
def test_yarn_keys_that_change_the_tables_are_refused_by_name(key, write_tiny):
    keys = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, f"llama.rope.scaling.{key}": 0.5}
    with pytest.raises(PshareError, match=rf"llama\.rope\.scaling\.{key} is 0.5"):
        GGUFFile(write_tiny("llama", keys))


def llama3_divisors(head_dim, theta, factor, original, low=1.0, high=4.0):
    """The frequency divisors of transformers' llama3 rope, in float32 as the converter stores them."""
    from transformers import LlamaConfig

    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=int(original * factor))
    plain = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()).astype(np.float32)


@pytest.mark.parametrize(
    ("head_dim", "theta", "factor", "original"),
    [(128, 500000.0, 8.0, 8192), (64, 500000.0, 32.0, 8192), (8, 12345.0, 8.0, 32), (64, 10000.0, 4.0, 4096)],
)
def test_llama3_scaling_is_recovered_from_its_divisors(head_dim, theta, factor, original, tmp_path):
    divisors = llama3_divisors(head_dim, theta, factor, original)
    assert llama3_scaling(tmp_path, divisors, theta, int(original * factor)) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def test_llama3_scaling_in_a_file(write_tiny):
    divisors = llama3_divisors(8, 12345.0, 8.0, 32)
    checkpoint = GGUFFile(write_tiny("llama", tensors={"rope_freqs.weight": divisors}))
    assert checkpoint.config["rope_scaling"]["original_max_position_embeddings"] == 32
    assert not any("rope" in name for name in checkpoint.names())
    ones = GGUFFile(write_tiny("llama", tensors={"rope_freqs.weight": np.ones(4, np.float32)}))
    assert "rope_scaling" not in ones.config
    with pytest.raises(PshareError, match=r"rope_freqs\.weight"):
        GGUFFile(write_tiny("llama", tensors={"rope_freqs.weight": np.array([1, 2, 3, 5], np.float32)}))
