"""LoRA folders in PEFT's format: PEFT loads ours, we load PEFT's; an unsupported option is an error that names it."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from reference import hf_logits, load_hf, load_peft
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, assert_close, edit_json, random_tokens, tiny_folder

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Params, is_lora
from pshare_jax.model.layers import LoraConfig
from pshare_jax.share.adapter_settings import CONFIG_FILE, HARMLESS, OFF, USED
from pshare_jax.share.lora import WEIGHTS_FILE, read_adapter, write_adapter

EVERY = ("q", "k", "v", "o", "gate", "up", "down")
SMALL = {"num_hidden_layers": 2, "std": 0.1}
TOKENS = random_tokens(0, 2, 12)


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory) -> tuple[Path, ps.Model]:
    changes: dict[str, Any] = {**SMALL}
    if request.param == "gemma3":
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    folder = tiny_folder(request.param, tmp_path_factory.mktemp("base"), **changes)
    return folder, ps.load(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> ps.Model:
    return ps.load(tiny_folder("llama", tmp_path_factory.mktemp("llama"), **SMALL))


def random_lora(model: ps.Model, lora: LoraConfig, seed: int = 0) -> Params:
    draw = np.random.default_rng(seed)
    shapes = model.architecture.with_lora(lora).shapes
    return {
        path: jnp.asarray(draw.normal(0, 0.2, leaf.shape), leaf.dtype) for path, leaf in shapes.items() if is_lora(path)
    }


def logits_with(model: ps.Model, lora: LoraConfig, params: Params) -> np.ndarray:
    """The plain forward pass with the adapter on every token, as PEFT computes it."""
    architecture = model.architecture.with_lora(lora)
    adapted = dataclasses.replace(model, architecture=architecture, params={**model.params, **params})
    return np.asarray(adapted.logits(TOKENS))


def written(tmp_path: Path, model: ps.Model, lora: LoraConfig | None = None, **changes: Any) -> Path:
    """An adapter folder of ours with changes in adapter_config.json."""
    lora = lora or LoraConfig(3, 1.5, ("q", "down"))
    write_adapter(tmp_path, lora, random_lora(model, lora), model.config)
    content = {**json.loads((tmp_path / CONFIG_FILE).read_text()), **changes}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    return tmp_path


def refusal(folder: Path, model: ps.Model) -> str:
    with pytest.raises(PshareError) as caught:
        read_adapter(folder, model)
    return str(caught.value)


def test_peft_loads_our_adapter(base, tmp_path):
    folder, model = base
    lora = LoraConfig(3, 1.5, EVERY)
    params = random_lora(model, lora)
    write_adapter(tmp_path, lora, params, model.config)
    expected = hf_logits(load_peft(folder, tmp_path), TOKENS)
    assert_close(logits_with(model, lora, params), expected)
    assert np.abs(hf_logits(load_hf(folder), TOKENS) - expected).max() > 0.01
    again, read = read_adapter(tmp_path, model)
    assert again == lora
    assert read.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(read[path], array)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"target_modules": "all-linear"}], ids=str)
def test_we_load_an_adapter_of_peft(base, options, tmp_path):
    folder, model = base
    settings = {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "o_proj", "up_proj"], "lora_dropout": 0.1}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = peft.get_peft_model(
            load_hf(folder), peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **options})
        ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(tmp_path)
    lora, params = read_adapter(tmp_path, model)
    assert lora.rank == 5
    assert lora.scale == pytest.approx(7 / 5**0.5 if "use_rslora" in options else 7 / 5)
    assert set(lora.targets) == (set(EVERY) if "target_modules" in options else {"q", "o", "up"})
    assert_close(logits_with(model, lora, params), hf_logits(adapted, TOKENS))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_stored_dtypes(llama, dtype, tmp_path):
    folder = written(tmp_path, llama)
    tensors = {name: values.astype(dtype) for name, values in load_file(folder / WEIGHTS_FILE).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    _, params = read_adapter(folder, llama)
    assert {array.dtype for array in params.values()} == {jnp.dtype("float32")}
    ours = params["layers.1.mlp.down.lora_a"]
    theirs = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]
    np.testing.assert_array_equal(ours, theirs.T.astype(np.float32))


def test_scale_survives_writing(llama, tmp_path):
    lora = LoraConfig(3, 0.7, ("k",))
    folder = written(tmp_path, llama, lora)
    assert read_adapter(folder, llama)[0].scale == pytest.approx(0.7)
    content = json.loads((folder / CONFIG_FILE).read_text())
    assert content["target_modules"] == ["k_proj"]
    assert content["peft_type"] == "LORA"


ON = {
    "peft_type": "IA3",
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "use_bdlora": {"target_modules_bd_a": ["q_proj"]},
    "arrow_config": {"top_k": 3},
    "init_lora_weights": "pissa",
}
REFUSED = {field.name for field in dataclasses.fields(peft.LoraConfig)} - USED - HARMLESS


@pytest.mark.parametrize("name", sorted(REFUSED | {"an_option_of_tomorrow"}))
def test_error_names_an_option_that_changes_the_output(name, llama, tmp_path):
    value = ON.get(name, True)
    message = refusal(written(tmp_path, llama, **{name: value}), llama)
    assert f"{name}: {value!r}" in message
    assert str(tmp_path) in message


def test_lists_of_options_name_options_of_peft():
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(ON) <= REFUSED
    assert known >= USED | HARMLESS | set(OFF)
    assert {"use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"} <= REFUSED


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initialisations_that_do_not_change_the_base(value, llama, tmp_path):
    read_adapter(written(tmp_path, llama, init_lora_weights=value), llama)


def test_defaults_of_peft_are_accepted(llama, tmp_path):
    """All fields that PEFT writes for a plain adapter."""
    folder = written(tmp_path, llama)
    content = json.loads((folder / CONFIG_FILE).read_text())
    plain = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]).to_dict()
    plain = json.loads(json.dumps(plain, default=lambda x: sorted(x) if isinstance(x, set) else str(x)))
    (folder / CONFIG_FILE).write_text(json.dumps({**content, **plain, "peft_type": "LORA"}))
    assert read_adapter(folder, llama)[0] == LoraConfig(3, 5 / 3, ("q", "down"))


@pytest.mark.parametrize(("name", "value"), [("r", 0), ("r", "8"), ("r", True), ("r", None), ("lora_alpha", -1)])
def test_numbers_must_be_positive(name, value, llama, tmp_path):
    assert f"{name} must be a positive number, not {value!r}" in refusal(
        written(tmp_path, llama, **{name: value}), llama
    )


def test_missing_and_broken_files(llama, tmp_path):
    folder = written(tmp_path, llama)
    (folder / WEIGHTS_FILE).write_bytes(b"not a safetensors file")
    assert WEIGHTS_FILE in refusal(folder, llama)
    (folder / WEIGHTS_FILE).unlink()
    assert WEIGHTS_FILE in refusal(folder, llama)
    (folder / CONFIG_FILE).write_text("{")
    assert CONFIG_FILE in refusal(folder, llama)
    (folder / CONFIG_FILE).write_text("[]")
    assert "JSON object" in refusal(folder, llama)
    (folder / CONFIG_FILE).unlink()
    assert CONFIG_FILE in refusal(folder, llama)


def test_one_error_lists_all_faults_of_tensors(llama, tmp_path):
    folder = written(tmp_path, llama)
    tensors = load_file(folder / WEIGHTS_FILE)
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{prefix}.1.mlp.down_proj.lora_B.weight"] = np.zeros((64, 2), np.float32)
    tensors[f"{prefix}.2.mlp.down_proj.lora_B.weight"] = np.zeros((64, 3), np.float32)
    tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 64), np.float32)
    save_file(tensors, folder / WEIGHTS_FILE)
    message = refusal(folder, llama)
    for part in (
        f"{prefix}.0.self_attn.q_proj.lora_A.weight is missing",
        f"{prefix}.1.mlp.down_proj.lora_B.weight has shape [64, 2] instead of [64, 3]",
        f"{prefix}.2.mlp.down_proj.lora_B.weight belongs to no projection",
        "base_model.model.lm_head.lora_A.weight belongs to no projection",
    ):
        assert part in message


def test_adapter_without_tensors(llama, tmp_path):
    folder = written(tmp_path, llama)
    save_file({}, folder / WEIGHTS_FILE)
    for listed in (["q_proj", "down_proj"], "all-linear"):
        edit_json(folder / CONFIG_FILE, target_modules=listed)
        assert "has no LoRA tensors" in refusal(folder, llama)
