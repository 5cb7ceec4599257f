"""Adapters that PEFT has made, of any shape, under any name: loaded exactly, or refused by name; ours in PEFT likewise."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from peft import PeftModel
from peft_adapters import random_adapter
from reference import hf_greedy, hf_logits, load_hf
from safetensors.numpy import load_file, save_file
from tiny import assert_close, edit_json, random_tokens, tiny_config, tiny_folder
from tiny_engine import COLOCATED
from tiny_tokenizer import write_tokenizer

import pshare_jax as ps
from pshare_jax.engine.config import BatchConfig, EngineConfig, KVConfig
from pshare_jax.engine.engine import Engine
from pshare_jax.errors import PshareError
from pshare_jax.evaluation.evaluate import load_any_module
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.layers import LoraConfig
from pshare_jax.share.adapter_settings import CONFIG_FILE
from pshare_jax.share.lora import WEIGHTS_FILE

TOKENS = random_tokens(0, 2, 12)
LAYER = "model.layers.1."
FEW = {"num_hidden_layers": 2, "std": 0.1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, ps.Model]:
    folder = tiny_folder("llama", tmp_path_factory.mktemp("llama"), **{**FEW, "num_hidden_layers": 3})
    return folder, ps.load(folder)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory) -> tuple[Path, ps.Model]:
    """Gemma 3 with a vision part, as transformers saves it."""
    folder = tmp_path_factory.mktemp("multimodal")
    # That class of transformers does not cap logits, and real files of it ask for no cap.
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    text = tiny_config("gemma3", **layers, final_logit_softcapping=None, initializer_range=0.1)
    vision = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    write_tokenizer(folder, "gemma3", vocab_size=text["vocab_size"])
    return folder, ps.load(folder)


def logits_of(module: ps.DecodeModule) -> np.ndarray:
    """The plain forward pass with the module on every token, as PEFT computes it."""
    return np.asarray(module.steps.forward(module.params, TOKENS))


def assert_exact(adapted: Any, folder: Path, base: ps.Model) -> ps.DecodeModule:
    """The adapter that PEFT saved changes the base's logits, and ours are PEFT's."""
    expected = hf_logits(adapted, TOKENS)
    assert np.abs(expected - np.asarray(base.logits(TOKENS))).max() > 0.01
    module = ps.load_module(folder, base, prefill="own")
    assert_close(logits_of(module), expected)
    return module


def own_refusal(folder: Path, base: ps.Model) -> str:
    with pytest.raises(PshareError) as caught:
        ps.load_module(folder, base, prefill="own")
    return str(caught.value)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}},
    "alphas": {"alpha_pattern": {"v_proj": 11, "^model.layers.0.self_attn.q_proj": 1}},
    "ranks, alphas, rslora": {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"down_proj": 2.5}, "use_rslora": True},
    "smaller ranks alone": {"r": 8, "rank_pattern": {"q_proj": 2, "v_proj": 3, "down_proj": 1}},
    "first pattern": {"rank_pattern": {".*proj": 3, "q_proj": 5}},
    "layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1},
    "layers by name": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "regular expression": {"target_modules": r".*layers\.[12]\.(self_attn\.[kv]_proj|mlp\.up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "full names": {"target_modules": [f"{LAYER}self_attn.o_proj", "0.mlp.gate_proj"]},
    "excluded": {"exclude_modules": r".*\.0\..*", "target_modules": ["q_proj", "up_proj"]},
    "excluded names": {"exclude_modules": ["1.self_attn.q_proj"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_shapes_that_one_lora_can_express(name, llama, tmp_path):
    folder, base = llama
    adapted = random_adapter(folder, tmp_path, **OPTIONS[name])
    assert_exact(adapted, tmp_path, base)


def test_unequal_adapters_are_padded_with_zeros(llama, tmp_path):
    folder, base = llama
    random_adapter(folder, tmp_path, rank_pattern={"q_proj": 2}, layers_to_transform=[1])
    module = ps.load_module(tmp_path, base, prefill="own")
    assert module.architecture.lora == LoraConfig(4, 1.5, ("q", "v", "down"))
    zeros = {path for path, array in module.params.items() if is_lora(path) and not np.asarray(array).any()}
    assert zeros == {path for path in module.params if is_lora(path) and not path.startswith("layers.1.")}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"rank_pattern": {"q_proj": 3}}, "q_proj.lora_A.weight has shape [4, 64] instead of [3, 64]"),
        ({"layers_to_transform": [0]}, f"{LAYER}self_attn.q_proj is not among the modules"),
        ({"target_modules": ["q_proj"]}, f"{LAYER}self_attn.v_proj is not among the modules"),
        (
            {"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]},
            f"{LAYER}self_attn.k_proj.lora_A.weight is m",
        ),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be an object of positive whole numbers"),
        ({"rank_pattern": [2]}, "rank_pattern must be"),
        ({"alpha_pattern": {"q_proj": "2"}}, "alpha_pattern must be an object of positive numbers"),
        ({"alpha_pattern": {"(": 2}}, "is not a regular expression"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be"),
        ({"target_modules": 3}, "target_modules must be"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform needs target_modules as a list"),
        ({"alora_invocation_tokens": ["a"]}, "alora_invocation_tokens must be a list of token ids"),
        ({"alora_invocation_tokens": 5}, "alora_invocation_tokens must be a list of token ids"),
        ({"alora_invocation_tokens": [1, 320]}, "alora_invocation_tokens must be below the base's 320"),
        ({"use_dora": True}, "use_dora: True"),
        ({"bias": "lora_only"}, "bias: 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head']"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(changes, part, llama, tmp_path):
    folder, base = llama
    random_adapter(folder, tmp_path)
    edit_json(tmp_path / CONFIG_FILE, **changes)
    message = own_refusal(tmp_path, base)
    assert part in message
    assert str(tmp_path) in message


# --- names -----------------------------------------------------------------------------------------------------------


def renamed(folder: Path, prefix: str, end: str = "") -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    old = "base_model.model.model.layers"
    save_file(
        {
            f"{prefix}layers{name.removeprefix(old)}".replace(".weight", f"{end}.weight"): x
            for name, x in tensors.items()
        },
        folder / WEIGHTS_FILE,
    )


@pytest.mark.parametrize("end", ["", ".default"])
@pytest.mark.parametrize("peft_prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", ""])
def test_names_go_through_the_prefix_rules_of_base_weights(prefix, peft_prefix, end, llama, tmp_path):
    folder, base = llama
    random_adapter(folder, tmp_path)
    expected = ps.load_module(tmp_path, base, prefill="own").params
    renamed(tmp_path, peft_prefix + prefix, end)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors[f"{peft_prefix}vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = np.ones((4, 8), np.float32)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    read = ps.load_module(tmp_path, base, prefill="own").params
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[path], array) for path, array in expected.items() if is_lora(path))


def test_a_parameter_with_two_names_is_refused(llama, tmp_path):
    folder, base = llama
    random_adapter(folder, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors |= {name.replace(".model.model.", ".model.language_model.model."): x for name, x in tensors.items()}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    assert "are the same parameter" in own_refusal(tmp_path, base)


def test_our_adapter_of_a_multimodal_base_acts_in_peft(multimodal, tmp_path):
    folder, base = multimodal
    architecture = base.architecture.with_lora(LoraConfig(3, 1.5, ("q", "v", "o", "down")))
    draw = np.random.default_rng(0)
    new = {
        path: jnp.asarray(draw.normal(0, 0.2, leaf.shape), leaf.dtype)
        for path, leaf in architecture.shapes.items()
        if is_lora(path)
    }
    module = ps.DecodeModule(architecture, {**base.params, **new}, base.mesh)
    ps.save_module(tmp_path, module, base)
    plain = load_hf(folder)
    assert type(plain).__name__ == "Gemma3ForConditionalGeneration"
    before = hf_logits(plain, TOKENS)
    with warnings.catch_warnings():
        # Any other warning, such as one about missing keys, is an error.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    expected = hf_logits(adapted, TOKENS)
    assert np.abs(expected - before).max() > 0.01
    assert_close(logits_of(module), expected)
    assert_close(logits_of(ps.load_module(tmp_path, base)), expected)
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(names) == len(new)
    assert all("language_model" in name for name in names)


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r".*language_model.*\.(q|v)_proj"], ids=str)
def test_adapter_of_peft_for_a_multimodal_base(targets, multimodal, tmp_path):
    folder, base = multimodal
    adapted = random_adapter(folder, tmp_path, target_modules=targets, rank_pattern={r"layers\.1\..*": 3})
    assert_exact(adapted, tmp_path, base)


# --- without a manifest ----------------------------------------------------------------------------------------------


def test_a_plain_adapter_is_served_by_its_own_weights_alone(llama, tmp_path):
    folder, base = llama
    adapted = random_adapter(folder, tmp_path)
    with pytest.raises(PshareError, match="ordinary fine-tune prefills with its own weights"):
        ps.load_module(tmp_path, base)
    assert load_any_module(str(tmp_path), base).architecture.lora is not None
    engine = Engine.build(
        base,
        EngineConfig(
            tasks={"a": str(tmp_path), "b": "base"},
            sharing="isolated",
            placement=COLOCATED,
            kv=KVConfig(4, 64),
            batch=BatchConfig(16, 2),
        ),
    )
    prompt = random_tokens(1, 21).tolist()
    for task, theirs in (("a", adapted), ("b", load_hf(folder))):
        [answer] = engine.generate([prompt], task, max_tokens=6, stop_ids=())
        assert answer.ids == hf_greedy(theirs, prompt, 6)


def test_an_adapter_beside_a_manifest_keeps_it(llama, tmp_path):
    """A folder with a manifest is checked by it, with its own weights too."""
    folder, base = llama
    random_adapter(folder, tmp_path / "a")
    module = ps.load_module(tmp_path / "a", base, prefill="own")
    ps.save_module(tmp_path / "b", dataclasses.replace(module), base)
    assert json.loads((tmp_path / "b" / "decode_module.json").read_text())["kind"] == "lora"
    edit_json(tmp_path / "b" / "decode_module.json", base_fingerprint="0" * 64)
    assert "another base" in own_refusal(tmp_path / "b", base)
