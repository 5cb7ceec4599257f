"""Quantised models and modules: they compute what float32 kernels of the same values do, in a quarter of the bytes, and only
modules whose base has the same form read their KV.
"""

import gc
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import FAMILIES, assert_close, edit_json, random_tokens, tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.model.quantization import FORMS, quantization_config, quantized, weight_form
from pshare_jax.share.decode_module import MANIFEST
from pshare_jax.share.quantize import main, quantize
from pshare_jax.weights.safetensors import SINGLE_FILE, SafetensorsFolder, write_safetensors

SMALL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A tiny base and its int8 form, and for each of them a full and a LoRA module; tests do not write to them."""
    root = tmp_path_factory.mktemp("quantized")
    tiny_folder("llama", root / "plain", **SMALL)
    quantize(root / "plain", root / "int8")
    for base in ("plain", "int8"):
        for kind in ("full", "lora"):
            tiny_module(root / base, root / f"{base}-{kind}", kind=kind)
    quantize(root / "plain-full", root / "plain-full-int8")
    return root


def by_hand(folder: Path, target: Path) -> Path:
    """The same model with float32 kernels, which NumPy multiplies from the file's tensors."""
    source = SafetensorsFolder(folder)
    tensors = {name: source.read(name) for name in source.names()}
    for name in [name for name in tensors if name.endswith("_scale")]:
        kernel = name.removesuffix("_scale")
        tensors[kernel] = tensors[kernel].astype(np.float32) * tensors.pop(name)
    write_safetensors(target, tensors.items())
    for file in [*folder.glob("*.json"), *folder.glob("*.jinja")]:
        (target / file.name).write_bytes(file.read_bytes())
    edit_json(target / "config.json", quantization_config=None)
    return target


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(PshareError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_value_is_off_by_no_more_than_the_form_allows(form, stored):
    weight = np.random.default_rng(0).normal(0, 0.3, (40, 64)).astype(stored)
    weight[3], weight[4] = 0, weight[4] * np.asarray(1e-5, stored)
    values, scale = quantized(weight, form)
    assert (values.dtype.name, values.shape, scale.dtype, scale.shape) == (form, (40, 64), np.float32, (40, 1))
    wide, most = weight.astype(np.float32), np.abs(weight.astype(np.float32)).max(axis=1, keepdims=True)
    error = np.abs(values.astype(np.float32) * scale - wide)
    # Half a step of int8; float8 has three bits after the leading one, and steps of 2 ** -9 near zero.
    allowed = most / 127 / 2 if form == "int8" else np.maximum(np.abs(wide) / 16, scale * 2.0**-10)
    assert (error <= allowed * 1.0001).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_float32_kernels_of_the_same_values(family, form, tmp_path):
    changes = {"attention_bias": True} if family == "qwen3" else {}
    folder = tiny_folder(family, tmp_path / "base", **changes)
    quantize(folder, tmp_path / "small", form)
    model, oracle = ps.load(tmp_path / "small"), ps.load(by_hand(tmp_path / "small", tmp_path / "oracle"))
    assert (model.architecture.weights, oracle.architecture.weights) == (form, None)
    tokens = random_tokens(1, 2, 21)
    assert_close(model.logits(tokens), oracle.logits(tokens))
    # Not those of the model that was quantised.
    assert np.abs(model.logits(tokens) - ps.load(folder).logits(tokens)).max() > 0.01
    for mesh in (ps.make_mesh([1, 2]), ps.make_mesh([0, 1, 2, 3])):
        assert_close(ps.load(tmp_path / "small", mesh=mesh).logits(tokens), oracle.logits(tokens))
    summing = model.architecture.summing_in(3)
    parts = ps.Model(**{**model.__dict__, "architecture": summing})
    assert_close(parts.logits(tokens), oracle.logits(tokens))


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_kernels_take_a_byte_a_weight(folders, dtype, size):
    held = []
    for name in ("plain", "int8"):
        before = live_bytes()
        model = ps.load(folders / name, dtype=dtype)
        held.append(live_bytes() - before)
        held.append({path: array.nbytes for path, array in model.params.items()})
        del model
    plain, kernels, small, params = held
    kernels = {path: count for path, count in kernels.items() if path.endswith(".kernel")}
    scales = sum(count for path, count in params.items() if path.endswith("_scale"))
    assert all(params[path] == count // size for path, count in kernels.items())
    assert plain - small == sum(kernels.values()) * (size - 1) // size - scales
    assert small == sum(params.values())


# --- files -----------------------------------------------------------------------------------------------------------


def test_saving_and_loading_again_changes_nothing(folders, tmp_path):
    model = ps.load(folders / "int8")
    ps.save_folder(tmp_path, model)
    again = ps.load(tmp_path)
    assert (again.fingerprint, again.architecture) == (model.fingerprint, model.architecture)
    assert again.params.keys() == model.params.keys()
    # From the cache of hashes.
    assert ps.load(tmp_path).fingerprint == model.fingerprint != ps.load(folders / "plain").fingerprint


def test_command(folders, tmp_path, capsys):
    arguments = ["--model", str(folders / "plain"), "--output", str(tmp_path / "new"), "--weights", "float8_e4m3fn"]
    assert main(arguments) == 0
    assert str(tmp_path / "new") in capsys.readouterr().out
    assert ps.load(tmp_path / "new").architecture.weights == "float8_e4m3fn"
    assert main(arguments) == 2
    assert (
        capsys.readouterr().err
        == f"pshare-quantize: {tmp_path / 'new'} exists already; give the name of a new folder.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_cannot_be_quantised_is_refused_and_leaves_nothing(folders, tmp_path):
    assert "has int8 weights already" in refusal(quantize, folders / "int8", tmp_path / "out")
    assert "is a LoRA adapter" in refusal(quantize, folders / "plain-lora", tmp_path / "out")
    assert "there is no model source" in refusal(quantize, folders / "none", tmp_path / "out")
    broken = tiny_folder("llama", tmp_path / "broken", **SMALL)
    tensors = load_file(broken / SINGLE_FILE)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    save_file(tensors, broken / SINGLE_FILE)
    message = refusal(quantize, broken, tmp_path / "out")
    assert message.startswith("tensor model.layers.1.mlp.up_proj.weight has values that are not finite")
    (tmp_path / "file").touch()
    assert "cannot write" in refusal(quantize, folders / "plain", tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "file"]


def test_a_number_is_never_read_as_another(folders, tmp_path):
    """A config that asks for another form than the tensors have."""
    theirs = quantization_config("int8")
    for name, config, words in (
        ("int8", None, "belongs to no parameter"),
        ("plain", theirs, "weight_scale is missing"),
    ):
        target = copied(folders / name, tmp_path / name)
        edit_json(target / "config.json", quantization_config=config)
        assert words in refusal(ps.load, target)
    target = copied(folders / "int8", tmp_path / "other")
    edit_json(target / "config.json", quantization_config=quantization_config("float8_e4m3fn"))
    assert "has dtype int8, but by its config.json the dtype must be float8_e4m3fn" in refusal(ps.load, target)
    target = copied(folders / "plain", tmp_path / "cast")
    tensors = load_file(target / SINGLE_FILE)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.int8)
    save_file(tensors, target / SINGLE_FILE)
    assert "has dtype int8, but by its config.json the dtype must be a floating-point" in refusal(ps.load, target)


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def with_group(**changes) -> dict:
    """A `quantization_config` of int8 with other fields of its group."""
    config = quantization_config("int8")
    [group] = config["config_groups"].values()
    weights = {**group["weights"], **changes.pop("weights", {})}
    return {**config, "config_groups": {"group_0": {**group, "weights": weights, **changes}}}


DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors"},
        "int8",
        with_group(weights={"num_bits": 4}),
        with_group(weights={"strategy": "group", "group_size": 128}),
        with_group(weights={"symmetric": False}),
        with_group(weights={"type": "float"}),
        with_group(format="pack-quantized"),
        with_group(input_activations={**DYNAMIC, "dynamic": False}),
        with_group(output_activations=DYNAMIC),
        {**quantization_config("int8"), "kv_cache_scheme": {"num_bits": 8}},
        {**quantization_config("int8"), "config_groups": {"a": {}, "b": {}}},
    ],
    ids=str,
)
def test_other_quantisation_is_refused(config):
    for content in ({"quantization_config": config}, {"text_config": {}, "quantization_config": config}):
        assert "pshare-quantize" in refusal(weight_form, content)


def test_what_other_tools_write_of_the_same_form_is_read(folders, tmp_path):
    """llm-compressor names the format of the whole file, and may ask for quantised activations; scales may be bfloat16."""
    config = with_group(input_activations=DYNAMIC, format=None)
    assert weight_form({"text_config": {"quantization_config": config}}) == "int8"
    target = copied(folders / "int8", tmp_path / "theirs")
    tensors = load_file(target / SINGLE_FILE)
    tensors = {name: x.astype(ml_dtypes.bfloat16) if name.endswith("_scale") else x for name, x in tensors.items()}
    save_file(tensors, target / SINGLE_FILE)
    edit_json(target / "config.json", quantization_config=config)
    model = ps.load(target)
    oracle = ps.load(by_hand(target, tmp_path / "oracle"))
    tokens = random_tokens(2, 1, 9)
    assert_close(model.logits(tokens), oracle.logits(tokens))


# --- modules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_module_of_another_form_of_the_base_is_refused(folders, kind):
    bases = {name: ps.load(folders / name) for name in ("plain", "int8")}
    for name, base in bases.items():
        ps.load_module(folders / f"{name}-{kind}", base)
    message = refusal(ps.load_module, folders / f"plain-{kind}", bases["int8"])
    assert "for a base with unquantised weights, but this base's are int8" in message
    message = refusal(ps.load_module, folders / f"int8-{kind}", bases["plain"])
    assert "for a base with int8 weights, but this base's are unquantised" in message


def test_another_base_in_the_same_form_is_refused_as_another_base(folders, tmp_path):
    quantize(tiny_folder("llama", tmp_path / "other", seed=9, **SMALL), tmp_path / "other-int8")
    assert "another base" in refusal(ps.load_module, folders / "int8-full", ps.load(tmp_path / "other-int8"))


def test_the_card_goes_along(folders, tmp_path):
    source = copied(folders / "plain-full", tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    quantize(source, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == (source / "README.md").read_text()


def test_a_quantised_module_reads_the_same_kv_as_before(folders, tmp_path):
    base = ps.load(folders / "plain")
    module, small = (ps.load_module(folders / name, base) for name in ("plain-full", "plain-full-int8"))
    assert (module.architecture.weights, small.architecture.weights) == (None, "int8")
    assert (folders / "plain-full" / MANIFEST).read_text() == (folders / "plain-full-int8" / MANIFEST).read_text()
    oracle = ps.load_module(by_hand(folders / "plain-full-int8", tmp_path / "oracle"), base)
    shared = ps.factorize(base)
    for name, one in (("small", small), ("oracle", oracle)):
        shared.add_task(name, one)
    kv = shared.prefill(random_tokens(3, 1, 11))
    tokens = random_tokens(4, 1, 5)
    assert_close(shared.decode("small", tokens, kv)[0], shared.decode("oracle", tokens, kv)[0])
    # It is saved as it is.
    ps.save_module(tmp_path / "again", small, base)
    assert ps.load_module(tmp_path / "again", base).architecture == small.architecture


def test_a_manifest_names_the_form_only_of_a_quantised_base(folders):
    found = {name: json.loads((folders / f"{name}-lora" / MANIFEST).read_text()) for name in ("plain", "int8")}
    assert "base_weights" not in found["plain"]
    assert found["int8"]["base_weights"] == "int8"
