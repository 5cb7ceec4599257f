"""The name table is complete for every variant, and one error lists all faults of a file (cases A4-11, A4-15)."""

import json

import pytest
from reference import hf_model
from tiny import FAMILIES

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Architecture
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.layers import Build
from pshare_jax.weights.names import file_name, plan, table

VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gemma3", {"attention_bias": True, "tie_word_embeddings": False}),
]


def parts(family, **changes):
    """A tiny model's ModelConfig and its tensors' names and shapes in transformers' own state dict."""
    model = hf_model(family, **changes)
    config = ModelConfig.from_hf({**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]})
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tied:
        del shapes["lm_head.weight"]
    return config, shapes


def faults(config, shapes):
    with pytest.raises(PshareError) as caught:
        plan(config, shapes, "the folder")
    return str(caught.value)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_table_is_the_models_parameters_and_transformers_tensors(family, changes):
    config, shapes = parts(family, **changes)
    entries = table(config)
    assert {file_name(entry): entry.shape for entry in entries} == shapes
    ours = {entry.path: entry.shape[::-1] if entry.transpose else entry.shape for entry in entries}
    assert ours == {path: leaf.shape for path, leaf in Architecture(config, Build()).shapes.items()}
    assert len({entry.path for entry in entries}) == len(entries)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_tensor_is_used_once(family, changes):
    config, shapes = parts(family, **changes)
    matched = plan(config, shapes, "the folder")
    assert sorted(name for _, name in matched.entries) == sorted(shapes)
    assert matched.extra_head is None


def test_one_error_lists_all_faults():
    config, shapes = parts("llama")
    shapes["model.layers.0.self_attn.query.weight"] = shapes.pop("model.layers.0.self_attn.q_proj.weight")
    del shapes["model.norm.weight"]
    shapes["model.layers.9.mlp.up_proj.weight"] = (112, 64)
    shapes["model.layers.1.mlp.down_proj.weight"] = (112, 64)
    message = faults(config, shapes)
    assert "the folder" in message
    for part in (
        "model.layers.0.self_attn.q_proj.weight is missing",
        "model.layers.0.self_attn.query.weight belongs to no parameter",
        "model.norm.weight is missing",
        "model.layers.9.mlp.up_proj.weight belongs to no parameter",
        "model.layers.1.mlp.down_proj.weight has shape [112, 64] instead of [64, 112]",
    ):
        assert part in message
    assert message.count(";") == 4


@pytest.mark.parametrize("name", ["embed_tokens.weight", "layers.1.input_layernorm.weight", "norm.weight"])
def test_each_kind_of_tensor_is_required(name):
    config, shapes = parts("llama")
    del shapes[f"model.{name}"]
    assert f"model.{name} is missing" in faults(config, shapes)


def test_untied_model_needs_its_head():
    config, shapes = parts("qwen3")
    del shapes["lm_head.weight"]
    assert "lm_head.weight is missing" in faults(config, shapes)
    assert "model.lm_head" not in faults(config, shapes)


def test_bias_tensors_must_match_the_config():
    config, shapes = parts("llama", attention_bias=True)
    without, _ = parts("llama")
    assert "self_attn.o_proj.bias belongs to no parameter" in faults(without, shapes)
    del shapes["model.layers.1.self_attn.k_proj.bias"]
    assert "model.layers.1.self_attn.k_proj.bias is missing" in faults(config, shapes)


def test_many_faults_are_counted():
    config, _ = parts("gemma3")
    message = faults(config, {})
    assert f"{len(table(config)) - 12} more" in message
    assert message.count("is missing") == 12


def test_two_names_for_one_parameter():
    config, shapes = parts("gemma3")
    shapes["language_model.model.norm.weight"] = shapes["model.norm.weight"]
    assert "language_model.model.norm.weight and model.norm.weight" in faults(config, shapes)


def test_head_of_a_tied_model_is_reported():
    config, shapes = parts("llama")
    shapes["lm_head.weight"] = (320, 64)
    assert plan(config, shapes, "the folder").extra_head == "lm_head.weight"


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_prefixes(prefix):
    config, shapes = parts("gemma3")
    renamed = {name.replace("model.", prefix, 1): shape for name, shape in shapes.items()}
    renamed["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = (4, 4)
    renamed["model.vision_tower.vision_model.embeddings.patch_embedding.bias"] = (4,)
    renamed["multi_modal_projector.mm_input_projection_weight"] = (4, 4)
    matched = plan(config, renamed, "the folder")
    assert len(matched.entries) == len(shapes)
    assert all(name.startswith(prefix) for _, name in matched.entries)


@pytest.mark.parametrize(
    ("name", "skipped"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("model.rotary_emb.inv_freq", True),
        ("model.vision_tower.x", True),
        ("multi_modal_projector.x", True),
        ("vision.x", False),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", False),
        ("model.layers.0.self_attn.q_proj.inv_freq", False),
        ("optimizer.x", False),
    ],
)
def test_skip_list(name, skipped):
    config, shapes = parts("llama")
    shapes[name] = (8,)
    if skipped:
        assert len(plan(config, shapes, "the folder").entries) == len(table(config))
    else:
        assert f"{name} belongs to no parameter" in faults(config, shapes)
