"""Decode modules on disk: what comes back is what was saved, what does not fit is refused, the base is never doubled."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import load_hf, load_peft
from safetensors.numpy import load_file, save_file
from tiny import edit_json, tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.layers import LoraConfig
from pshare_jax.share.decode_module import MANIFEST, read_manifest
from pshare_jax.weights.safetensors import SINGLE_FILE, SafetensorsFolder, write_safetensors

SMALL = {"num_hidden_layers": 2}


@dataclasses.dataclass
class Made:
    folder: Path
    base: ps.Model
    full: Path
    lora: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A tiny tied base, a full and a LoRA module of it (never written to)."""
    root = tmp_path_factory.mktemp("modules")
    folder = tiny_folder("llama", root / "base", **SMALL)
    full, lora = (tiny_module(folder, root / kind, kind=kind) for kind in ("full", "lora"))
    return Made(folder, ps.load(folder), full, lora)


@pytest.fixture
def full(made, tmp_path) -> Path:
    """A full module that a test may spoil."""
    return tiny_module(made.folder, tmp_path / "full")


def base_module(base: ps.Model) -> ps.DecodeModule:
    return ps.DecodeModule(base.architecture, base.params, base.mesh)


def refusal(folder: Path | str, base: ps.Model, **options: Any) -> str:
    with pytest.raises(PshareError) as caught:
        ps.load_module(folder, base, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_full_module_comes_back(made, tmp_path):
    draw = np.random.default_rng(0)
    params = {path: x + jnp.asarray(draw.normal(size=x.shape), x.dtype) for path, x in made.base.params.items()}
    saved = ps.DecodeModule(made.base.architecture, params, made.base.mesh)
    ps.save_module(tmp_path / "deep" / "module", saved, made.base)
    loaded = ps.load_module(tmp_path / "deep" / "module", made.base)
    assert loaded.architecture == made.base.architecture
    assert loaded.params.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(loaded.params[path], array)
    # A tied module stays tied: no head in the file.
    assert "lm_head.weight" not in SafetensorsFolder(tmp_path / "deep" / "module").names()
    load_hf(tmp_path / "deep" / "module")


def test_lora_module_comes_back(made, tmp_path):
    lora = LoraConfig(2, 0.5, ("k", "gate"))
    architecture = made.base.architecture.with_lora(lora)
    new = {path: jnp.full(x.shape, 0.25, x.dtype) for path, x in architecture.shapes.items() if is_lora(path)}
    module = ps.DecodeModule(architecture, {**made.base.params, **new}, made.base.mesh)
    ps.save_module(tmp_path, module, made.base)
    loaded = ps.load_module(tmp_path, made.base)
    assert loaded.architecture == architecture
    assert loaded.params.keys() == module.params.keys()
    for path, array in new.items():
        np.testing.assert_array_equal(loaded.params[path], array)
    assert not list(tmp_path.glob("model*.safetensors"))
    load_peft(made.folder, tmp_path)


def test_lora_shares_the_bases_arrays(made):
    loaded = ps.load_module(made.lora, made.base)
    assert all(loaded.params[path] is array for path, array in made.base.params.items())


def test_full_module_equal_to_the_base_shares_its_arrays(made, tmp_path):
    ps.save_module(tmp_path, base_module(made.base), made.base)
    loaded = ps.load_module(tmp_path, made.base)
    assert loaded.params is made.base.params


def test_full_module_that_differs_shares_nothing(made):
    loaded = ps.load_module(made.full, made.base)
    assert not any(loaded.params[path] is array for path, array in made.base.params.items())


def test_base_is_there_once_for_each_mesh_not_for_each_task(made, tmp_path):
    ps.save_module(tmp_path / "same", base_module(made.base), made.base)
    decode = ps.TaskModules(made.base, ps.make_mesh([1, 2], 2))
    for name, source in (("base", "base"), ("same", tmp_path / "same"), ("a", made.lora), ("b", made.lora)):
        decode.add_task(name, source)
    assert decode.model.params["embedding.weight"] is not made.base.params["embedding.weight"]
    for name in decode.tasks:
        params = decode.module(name).params
        assert all(params[path] is array for path, array in decode.model.params.items()), name
        assert {device.id for array in params.values() for device in array.devices()} == {1, 2}


def test_card(made):
    card = json.loads((made.full / MANIFEST).read_text())
    assert card == {
        "kind": "full",
        "base_fingerprint": made.base.fingerprint,
        "tokenizer": made.base.tokenizer.fingerprint,
        "chat_template": made.base.tokenizer.template_fingerprint,
        "prefill": "base",
        "training": {},
        "version": 1,
    }
    assert read_manifest(made.lora).kind == "lora"


def test_training_notes_are_kept(made, tmp_path):
    ps.save_module(tmp_path, base_module(made.base), made.base, training={"data": "x.jsonl", "steps": 3})
    assert read_manifest(tmp_path).training == {"data": "x.jsonl", "steps": 3}


def test_card_is_gone_while_weights_are_written(made, tmp_path, monkeypatch):
    """A save that dies half-way may not leave new weights under an old card."""
    ps.save_module(tmp_path, base_module(made.base), made.base)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pshare_jax.share.decode_module.save_folder", die)
    with pytest.raises(KeyboardInterrupt):
        ps.save_module(tmp_path, base_module(made.base), made.base)
    assert not (tmp_path / MANIFEST).exists()


def test_made_for_another_base(made, tmp_path):
    other = ps.load(tiny_folder("llama", tmp_path, seed=1, **SMALL))
    for folder in (made.full, made.lora):
        message = refusal(folder, other)
        assert "made for another base" in message
        assert made.base.fingerprint[:12] in message
        assert other.fingerprint[:12] in message


def test_same_weights_under_another_rope_is_another_base(made, tmp_path):
    folder = tiny_folder("llama", tmp_path, **SMALL)
    edit_json(folder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 9.0})
    assert "made for another base" in refusal(made.full, ps.load(folder))


def test_another_tokenizer_or_template(made, full):
    edit_json(full / MANIFEST, tokenizer="0" * 64)
    assert "another tokenizer" in refusal(full, made.base)
    edit_json(full / MANIFEST, tokenizer=made.base.tokenizer.fingerprint, chat_template="1" * 64)
    assert "another chat template" in refusal(full, made.base)


def test_trained_on_its_own_prefill(made, full):
    """It is refused where the KV is the base's, and only there."""
    ps.save_module(full, base_module(made.base), made.base, prefill="own")
    assert "trained with prefill 'own', but here the KV comes from the base" in refusal(full, made.base)
    shared = ps.factorize(made.base)
    with pytest.raises(PshareError, match="trained with prefill 'own'"):
        shared.add_task("own", full)
    assert shared.tasks == ()
    ps.load_module(full, made.base, prefill="own")
    decode = ps.TaskModules(made.base, prefill="own")
    decode.add_task("own", full)
    assert decode.tasks == ("own",)


def test_own_prefill_takes_modules_of_the_bases_prefill_too(made):
    """The baseline compares the very same weights."""
    for folder in (made.full, made.lora):
        shared, own = ps.load_module(folder, made.base), ps.load_module(folder, made.base, prefill="own")
        assert own.architecture == shared.architecture
        for path, array in shared.params.items():
            np.testing.assert_array_equal(own.params[path], array)


def test_own_prefill_takes_any_full_fine_tune(made, full):
    """An ordinary Hugging Face folder has no card; its weights make their own KV, so nothing can be wrong with it."""
    expected = ps.load_module(full, made.base).params
    (full / MANIFEST).unlink()
    assert f"has no {MANIFEST}" in refusal(full, made.base)
    loaded = ps.load_module(full, made.base, prefill="own")
    assert loaded.architecture == made.base.architecture
    for path, array in expected.items():
        np.testing.assert_array_equal(loaded.params[path], array)
    decode = ps.TaskModules(made.base, prefill="own")
    decode.add_task("tuned", full)
    with pytest.raises(PshareError, match=f"has no {MANIFEST}"):
        ps.TaskModules(made.base).add_task("tuned", full)
    # The base's own folder is such a fine-tune as well, and costs no second copy.
    assert ps.load_module(made.folder, made.base, prefill="own").params is made.base.params


def test_own_prefill_still_refuses_what_does_not_fit(made, full, tmp_path):
    def own(folder: Path | str, base: ps.Model = made.base) -> str:
        return refusal(folder, base, prefill="own")

    assert "no decode module folder" in own("nowhere/to/be/found")
    other = ps.load(tiny_folder("llama", tmp_path / "other", seed=1, **SMALL))
    assert "made for another base" in own(made.full, other)
    assert "another architecture" in own(tiny_folder("llama", tmp_path / "deeper", num_hidden_layers=3))
    edit_json(full / MANIFEST, tokenizer="0" * 64)
    assert "another tokenizer" in own(full)
    # An adapter without a card does not say which base it belongs to.
    adapter = tiny_module(made.folder, tmp_path / "adapter", kind="lora")
    (adapter / MANIFEST).unlink()
    assert str(adapter) in own(adapter)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in own(tmp_path / "empty")


def test_ordinary_fine_tune(made):
    """It would answer fluently and wrongly on the base's KV."""
    message = refusal(made.folder, made.base)
    assert f"has no {MANIFEST}" in message
    assert "prefills with its own weights" in message
    assert "no decode module folder" in refusal("nowhere/to/be/found", made.base)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not a readable"),
        ("[]", "not a readable"),
        ("null", "not a readable"),
        ({"kind": "dora"}, "kind 'dora'"),
        ({"prefill": "theirs"}, "prefill 'theirs'"),
        ({"version": 2}, "version 2"),
        ({"extra": 1}, "extra"),
        ({"base_fingerprint": None}, "base_fingerprint"),
        ({"base_fingerprint": 5}, "base_fingerprint"),
        ({"tokenizer": ["x"]}, "tokenizer"),
        ({"kind": None}, "kind"),
        ({"kind": ["full"]}, "kind"),
    ],
)
def test_bad_cards(made, full, content, part):
    if isinstance(content, str):
        (full / MANIFEST).write_text(content)
    else:
        edit_json(full / MANIFEST, **content)
    message = refusal(full, made.base)
    assert part in message
    assert str(full) in message


def test_other_architecture(made, full, tmp_path):
    other = tiny_folder("llama", tmp_path / "deeper", num_hidden_layers=3)
    for name in (SINGLE_FILE, "config.json"):
        (full / name).write_bytes((other / name).read_bytes())
    assert "another architecture" in refusal(full, made.base)


def test_faults_of_tensors_come_in_one_message(made, full):
    tensors = load_file(full / SINGLE_FILE)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.norm.weight"] = np.zeros(63, np.float32)
    save_file(tensors, full / SINGLE_FILE)
    message = refusal(full, made.base)
    for part in (
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.layers.7.mlp.up_proj.weight belongs to no parameter",
        "model.norm.weight has shape [63] instead of [64]",
    ):
        assert part in message


def test_module_with_a_head_of_its_own(made, full):
    """A tied base, a module whose training untied the head: both are kept, as transformers would."""
    tensors = load_file(full / SINGLE_FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    write_safetensors(full, tensors.items())
    edit_json(full / "config.json", tie_word_embeddings=False)
    loaded = ps.load_module(full, made.base)
    assert not loaded.architecture.config.tied
    np.testing.assert_array_equal(loaded.params["head"].T, tensors["lm_head.weight"])


def test_context_length_is_the_bases(made, full):
    edit_json(full / "config.json", max_position_embeddings=64)
    assert ps.load_module(full, made.base).architecture.config.max_len == made.base.config.max_len


def test_run_dtype_is_the_bases(made):
    base = ps.load(made.folder, dtype="bfloat16")
    for folder in (made.full, made.lora):
        loaded = ps.load_module(folder, base)
        assert {array.dtype for array in loaded.params.values()} == {jnp.dtype("bfloat16")}


def test_saving_and_loading_leave_the_base_alone(made, tmp_path):
    """Invariant 6."""
    before = jax.tree.map(np.array, made.base.params)
    module = ps.load_module(made.lora, made.base)
    ps.save_module(tmp_path, module, made.base)
    ps.load_module(made.full, made.base)
    for path, array in made.base.params.items():
        np.testing.assert_array_equal(array, before[path])
