"""config.json as in real files: old and new style, absent and null fields, conflicts, nesting (cases A4-06, 07, 14)."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from reference import HF_CONFIGS, hf_config
from tiny import random_tokens, tiny_config, tiny_folder

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.model.config import FAMILIES, ModelConfig, text_config


def new_style(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of transformers 5 for a tiny model; None writes null, `...` removes the field."""
    content = {**hf_config(family).to_dict(), **changes}
    return {key: value for key, value in content.items() if value is not ...}


def old_style(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of transformers 4 for the same model."""
    without = {"rope_parameters": ...} if family != "gemma3" else {"rope_parameters": ..., "layer_types": ...}
    rope: dict[str, dict[str, Any]] = {
        "llama": {"rope_theta": 12345.0, "rope_scaling": None},
        "qwen3": {"rope_theta": 54321.0, "rope_scaling": None},
        "gemma3": {
            "rope_theta": 12345,
            "rope_local_base_freq": 321.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 2,
        },
    }
    return new_style(family, **without, **rope[family], **changes)


def read(content: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_hf(json.loads(json.dumps(content)))


def refusal(content: dict[str, Any]) -> str:
    with pytest.raises(PshareError) as caught:
        read(content)
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_defaults_are_transformers(family):
    theirs = HF_CONFIGS[family.name]()
    full = {"hidden_size": 128, "num_attention_heads": 64}
    for key, default in family.defaults.items():
        if key == "sliding_window_pattern":
            expected = theirs.layer_types.index("full_attention") + 1
        elif key == "rope_theta":
            expected = (theirs.rope_parameters.get("full_attention") or theirs.rope_parameters)["rope_theta"]
        elif key == "rope_local_base_freq":
            expected = theirs.rope_parameters["sliding_attention"]["rope_theta"]
        elif key == "sliding_window" and family.name == "qwen3":
            expected = HF_CONFIGS["qwen3"](use_sliding_window=True).sliding_window
        elif default is None and key in ("head_dim", "num_key_value_heads", "layer_types"):
            # Derived from other fields, compared below.
            continue
        else:
            expected = getattr(theirs, key)
        assert default == expected, key
    needed = {key: getattr(theirs, key) for key in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    content = {"architectures": [family.architectures[0]], **full, **needed}
    same = HF_CONFIGS[family.name](**full)
    ours = read(content)
    assert (ours.num_kv_heads, ours.head_dim) == (same.num_key_value_heads, same.head_dim)
    assert [layer.window is not None for layer in ours.layers] == [
        kind == "sliding_attention" for kind in getattr(same, "layer_types", ["full_attention"] * ours.num_layers)
    ]


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_old_and_new_style_give_the_same_config(family):
    assert read(old_style(family)) == read(new_style(family))


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_old_and_new_style_give_identical_logits(family, tmp_path):
    """A4-06, with theta 5e5."""
    few: dict[str, Any] = {"num_hidden_layers": 2}
    if family == "gemma3":
        theta = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 321.0},
        }
        few["layer_types"] = ["sliding_attention", "full_attention"]
    else:
        theta = {"rope_type": "default", "rope_theta": 5e5}
    folder = tiny_folder(family, tmp_path, **few, rope_parameters=theta)
    new = ps.load(folder)
    pattern = {"sliding_window_pattern": 2} if family == "gemma3" else {}
    old = {**old_style(family), **{k: v for k, v in few.items() if k != "layer_types"}, "rope_theta": 5e5, **pattern}
    (folder / "config.json").write_text(json.dumps(old))
    assert "rope_parameters" not in old
    again = ps.load(folder)
    assert again.config == new.config
    assert again.config.layers[-1].rope.theta == 5e5
    tokens = random_tokens(0, 1, 30)
    np.testing.assert_array_equal(again.logits(tokens), new.logits(tokens))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_theta_of_either_style_overrides_the_default(family):
    """A4-07."""
    rope = {"rope_type": "default", "rope_theta": 5e5}

    def theta(**changes: Any) -> float:
        return read(new_style(family, **changes)).layers[0].rope.theta

    assert theta(rope_parameters=rope) == 5e5
    assert theta(rope_parameters=rope, rope_theta=None) == 5e5
    assert theta(rope_parameters=rope, rope_theta=500_000) == 5e5
    assert theta(rope_parameters=None, rope_theta=5e5) == 5e5
    assert theta(rope_parameters={"rope_type": "default"}, rope_theta=5e5) == 5e5
    assert theta(rope_parameters=..., rope_scaling={"type": "default"}, rope_theta=5e5) == 5e5
    assert theta(rope_parameters=...) == 10000.0
    message = refusal(new_style(family, rope_parameters=rope, rope_theta=10000.0))
    assert "rope_theta" in message
    assert "500000.0" in message
    assert "10000.0" in message


def test_conflicts_within_gemmas_two_ropes():
    nested = tiny_config("gemma3")["rope_parameters"]
    same = read(new_style("gemma3", rope_theta=12345.0, rope_local_base_freq=321.0))
    assert same == read(new_style("gemma3"))
    assert "rope_theta" in refusal(new_style("gemma3", rope_theta=1e6))
    assert "321" in refusal(new_style("gemma3", rope_local_base_freq=10000.0))
    only_global = read(new_style("gemma3", rope_parameters={"full_attention": nested["full_attention"]}))
    assert only_global.layers[0].rope.theta == 10_000.0
    assert only_global.layers[1].rope == same.layers[1].rope


def test_scaling_in_both_styles_must_agree():
    linear = {"rope_type": "linear", "factor": 3.0, "rope_theta": 777.0}
    assert "rope_type" in refusal(new_style("llama", rope_parameters=linear, rope_scaling={"type": "default"}))
    assert "factor" in refusal(
        new_style("llama", rope_parameters=linear, rope_scaling={"type": "linear", "factor": 4.0})
    )
    agreed = read(new_style("llama", rope_parameters=linear, rope_scaling={"type": "linear", "factor": 3}))
    assert agreed == read(new_style("llama", rope_parameters=linear))


def test_head_dim():
    """A4-14: an explicit head_dim takes precedence; null and absent mean hidden / heads (if the family derives it)."""
    assert read(new_style("qwen3", head_dim=32)).head_dim == 32
    assert read(new_style("qwen3", head_dim=...)).head_dim == HF_CONFIGS["qwen3"]().head_dim
    assert [read(new_style("llama", head_dim=value)).head_dim for value in (None, ..., 16, 20)] == [16, 16, 16, 20]
    assert "head_dim 15" in refusal(new_style("llama", head_dim=15))


def test_key_value_heads():
    assert read(new_style("llama", num_key_value_heads=None)).num_kv_heads == 4
    assert read(new_style("llama", num_key_value_heads=...)).num_kv_heads == 4
    assert "num_key_value_heads 3" in refusal(new_style("llama", num_key_value_heads=3))


def test_windows():
    qwen = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ...}

    def windows(family: str, **changes: Any) -> list[int | None]:
        return [layer.window for layer in read(new_style(family, **changes)).layers]

    assert windows("qwen3", **qwen, max_window_layers=1) == [None, 5]
    assert windows("qwen3", **qwen, max_window_layers=0) == [5, 5]
    assert windows("qwen3", **{**qwen, "use_sliding_window": False}, max_window_layers=1) == [None] * 2
    kinds = ["sliding_attention", "full_attention"]
    assert windows("qwen3", **{**qwen, "layer_types": kinds}) == [5, None]
    twelve = {"num_hidden_layers": 12}
    assert windows("gemma3", layer_types=None, **twelve) == ([8] * 5 + [None]) * 2
    assert windows("gemma3", layer_types=..., sliding_window_pattern=4, **twelve) == ([8] * 3 + [None]) * 3
    for bad in (kinds[:1], ["full_attention", "chunked_attention"]):
        assert "layer_types" in refusal(new_style("qwen3", **{**qwen, "layer_types": bad}))


def test_unknown_architecture_lists_the_known_ones():
    message = refusal(new_style("llama", architectures=["MambaForCausalLM"]))
    assert "MambaForCausalLM" in message
    assert all(name in message for family in FAMILIES for name in family.architectures)
    assert "mamba" in refusal({"model_type": "mamba"})
    assert "architecture" in refusal({})


@pytest.mark.parametrize("family", HF_CONFIGS)
def test_model_type_replaces_missing_architectures(family):
    assert read(new_style(family, architectures=...)) == read(new_style(family))
    assert read(new_style(family, architectures=None)) == read(new_style(family))


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_missing_fields_are_named(family, key):
    for absent in (..., None):
        assert f"'{key}'" in refusal(new_style(family, **{key: absent}))


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("hidden_size", "64", "int"),
        ("hidden_size", 64.0, "int"),
        ("num_hidden_layers", True, "int"),
        ("vocab_size", -5, "positive"),
        ("intermediate_size", 0, "positive"),
        ("rms_norm_eps", "1e-6", "float"),
        ("tie_word_embeddings", 1, "bool"),
        ("attention_bias", "yes", "bool"),
        ("max_position_embeddings", [512], "int"),
        ("head_dim", "16", "int"),
        ("max_window_layers", "28", "int"),
        ("layer_types", "full_attention", "layer_types"),
        ("rope_parameters", [1], "rope_parameters"),
        ("rope_scaling", "linear", "rope_scaling"),
        ("rope_theta", -1.0, "rope_theta"),
    ],
)
def test_wrong_values_are_named(key, value, kind):
    content = new_style("qwen3", use_sliding_window=True, sliding_window=5, layer_types=...)
    if key == "rope_theta":
        content.pop("rope_parameters")
    message = refusal({**content, key: value})
    assert key in message
    assert kind in message


def test_error_names_an_unsupported_feature():
    assert "quantization_config" in refusal(new_style("llama", quantization_config={"quant_method": "gptq"}))
    assert "bidirectional" in refusal(new_style("gemma3", use_bidirectional_attention=True))
    assert "'relu'" in refusal(new_style("llama", hidden_act="relu"))
    assert "partial_rotary_factor" in refusal(new_style("llama", partial_rotary_factor=0.5))
    no_window = {"sliding_window": None, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
    assert read(new_style("qwen3", **{**no_window, "use_sliding_window": False})).layers[0].window is None


def test_text_config_of_a_multimodal_file():
    text = new_style("gemma3", architectures=...)
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    assert read(nested) == read(new_style("gemma3"))
    assert text_config(nested)["vocab_size"] == text["vocab_size"]
    text.pop("tie_word_embeddings")
    assert read({**nested, "tie_word_embeddings": False}).tied is False
    assert read({**nested, "text_config": {**text, "tie_word_embeddings": True}, "tie_word_embeddings": False}).tied


def test_sparse_text_config_has_the_familys_defaults():
    """The published Gemma 3 4B file leaves out vocabulary, heads, head_dim, norms and both rope bases."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    ours = read({"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text})
    theirs: Any = HF_CONFIGS["gemma3"](**text)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (8, 4, 256)
    assert ours.vocab_size == theirs.vocab_size
    for layer, kind in zip(ours.layers, theirs.layer_types, strict=True):
        rope = theirs.rope_parameters[kind]
        assert (layer.rope.theta, layer.rope.type) == (rope["rope_theta"], rope["rope_type"])
        assert layer.window == (1024 if kind == "sliding_attention" else None)


def test_layer_fields_omit_only_limits_and_names():
    config = read(new_style("gemma3"))
    fields = config.layer_fields()
    assert set(fields) == {field.name for field in dataclasses.fields(config)} - {"max_len", "family"}
    json.dumps(fields)


def test_config_is_hashable():
    assert hash(read(new_style("llama"))) == hash(read(old_style("llama")))


@pytest.mark.parametrize(
    ("family", "change", "word"),
    [
        ("llama", {"architectures": 5}, "architectures"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta"),
        ("llama", {"rope_parameters": {"sliding_attention": {"rope_theta": 5.0}}}, "full_attention"),
        ("gemma3", {"layer_types": 5}, "layer_types"),
        ("gemma3", {"layer_types": [["full_attention"]] * 4}, "layer_types"),
        ("gemma3", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, "rope_parameters"),
    ],
)
def test_error_names_a_malformed_field(family, change, word):
    with pytest.raises(PshareError, match=word):
        ModelConfig.from_hf(new_style(family, **change))
