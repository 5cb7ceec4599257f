"""Decode modules on disk: loading returns what was saved, a module that does not fit is an error, one copy of the base."""

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
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tool_format import FORMATS, ToolFormat
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
    """A tiny tied base, a full and a LoRA module of it; tests do not write to them."""
    root = tmp_path_factory.mktemp("modules")
    folder = tiny_folder("llama", root / "base", **SMALL)
    full, lora = (tiny_module(folder, root / kind, kind=kind) for kind in ("full", "lora"))
    return Made(folder, ps.load(folder), full, lora)


@pytest.fixture
def full(made, tmp_path) -> Path:
    """A full module that a test may change."""
    return tiny_module(made.folder, tmp_path / "full")


def refusal(folder: Path | str, base: ps.Model, **options: Any) -> str:
    with pytest.raises(PshareError) as caught:
        ps.load_module(folder, base, **options)
    return str(caught.value)


def test_full_module_round_trip(made, tmp_path):
    draw = np.random.default_rng(0)
    params = {path: x + jnp.asarray(draw.normal(size=x.shape), x.dtype) for path, x in made.base.params.items()}
    saved = ps.DecodeModule(made.base.architecture, params, made.base.mesh)
    ps.save_module(tmp_path / "deep" / "module", saved, made.base)
    loaded = ps.load_module(tmp_path / "deep" / "module", made.base)
    assert loaded.architecture == made.base.architecture
    assert loaded.params.keys() == params.keys()
    for path, array in params.items():
        np.testing.assert_array_equal(loaded.params[path], array)
    # A tied module has no head in the file.
    assert "lm_head.weight" not in SafetensorsFolder(tmp_path / "deep" / "module").names()
    load_hf(tmp_path / "deep" / "module")


def test_lora_module_round_trip(made, tmp_path):
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
    ps.save_module(tmp_path, made.base, made.base)
    loaded = ps.load_module(tmp_path, made.base)
    assert loaded.params is made.base.params


def test_full_module_that_differs_shares_nothing(made):
    loaded = ps.load_module(made.full, made.base)
    assert not any(loaded.params[path] is array for path, array in made.base.params.items())


def test_tasks_of_one_mesh_share_the_bases_arrays(made, tmp_path):
    ps.save_module(tmp_path / "same", made.base, made.base)
    decode = ps.TaskModules(made.base, ps.make_mesh([1, 2]))
    for name, source in (("base", "base"), ("same", tmp_path / "same"), ("a", made.lora), ("b", made.lora)):
        decode.add_task(name, source)
    assert decode.model.params["embedding.weight"] is not made.base.params["embedding.weight"]
    for name in decode.tasks:
        params = decode.module(name).params
        assert all(params[path] is array for path, array in decode.model.params.items()), name
        assert {device.id for array in params.values() for device in array.devices()} == {1, 2}


def test_manifest(made):
    assert json.loads((made.full / MANIFEST).read_text()) == {
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
    ps.save_module(tmp_path, made.base, made.base, training={"data": "x.jsonl", "steps": 3})
    assert read_manifest(tmp_path).training == {"data": "x.jsonl", "steps": 3}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_chat_style_is_kept(made, tmp_path, kind):
    """By saving and loading, and by saving what was loaded; a plain module's manifest says nothing of it."""
    folder = made.full if kind == "full" else made.lora
    module = ps.load_module(folder, made.base)
    assert module.style == ChatStyle()
    assert {"tool_format", "layout"}.isdisjoint(json.loads((folder / MANIFEST).read_text()))
    for number, style in enumerate(
        (
            ChatStyle(FORMATS["json_list"], "last"),
            ChatStyle(ToolFormat("custom", "<é>", "</é>", "list", "input")),
            ChatStyle(system="drop"),
        )
    ):
        ps.save_module(tmp_path / str(number), module, made.base, style=style)
        loaded = ps.load_module(tmp_path / str(number), made.base)
        assert loaded.style == read_manifest(tmp_path / str(number)).style == style
        ps.save_module(tmp_path / "again", loaded, made.base)
        assert ps.load_module(tmp_path / "again", made.base).style == style


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"tool_format": "xml"}, "tool_format 'xml' hermes"),
        ({"tool_format": {"start": 5}}, "tool_format.start text"),
        ({"layout": {"system": "middle"}}, "layout.system last"),
        ({"layout": "last"}, "layout system"),
    ],
)
def test_faults_of_the_chat_style_are_named(made, full, content, words):
    edit_json(full / MANIFEST, **content)
    message = refusal(full, made.base)
    assert all(word in message for word in words.split())


def test_manifest_is_removed_before_weights_are_written(made, tmp_path, monkeypatch):
    """An interrupted save must not leave new weights under an old manifest."""
    ps.save_module(tmp_path, made.base, made.base)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pshare_jax.share.decode_module.save_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ps.save_module(tmp_path, made.base, made.base)
    assert not (tmp_path / MANIFEST).exists()


def test_made_for_another_base(made, tmp_path):
    other = ps.load(tiny_folder("llama", tmp_path, seed=1, **SMALL))
    for folder in (made.full, made.lora):
        message = refusal(folder, other)
        for part in ("base_fingerprint", made.base.fingerprint[:12], other.fingerprint[:12]):
            assert part in message


def test_another_tokenizer_or_template(made, full):
    edit_json(full / MANIFEST, tokenizer="0" * 64)
    assert "tokenizer" in refusal(full, made.base)
    edit_json(full / MANIFEST, tokenizer=made.base.tokenizer.fingerprint, chat_template="1" * 64)
    assert "chat_template" in refusal(full, made.base)


def test_module_trained_on_its_own_kv(made, full):
    """It is an error only with the base's KV."""
    ps.save_module(full, made.base, made.base, prefill="own")
    assert "prefill 'own'" in refusal(full, made.base)
    shared = ps.factorize(made.base)
    with pytest.raises(PshareError, match="prefill 'own'"):
        shared.add_task("own", full)
    assert shared.tasks == ()
    ps.load_module(full, made.base, prefill="own")
    decode = ps.TaskModules(made.base, prefill="own")
    decode.add_task("own", full)
    assert decode.tasks == ("own",)


def test_own_prefill_accepts_modules_trained_on_the_bases_kv(made):
    """The baseline compares the same weights."""
    for folder in (made.full, made.lora):
        shared, own = ps.load_module(folder, made.base), ps.load_module(folder, made.base, prefill="own")
        assert own.architecture == shared.architecture
        for path, array in shared.params.items():
            np.testing.assert_array_equal(own.params[path], array)


def test_own_prefill_accepts_any_full_fine_tune(made, full):
    """An ordinary Hugging Face folder has no manifest; its own weights compute its KV, so it needs none."""
    expected = ps.load_module(full, made.base).params
    (full / MANIFEST).unlink()
    assert MANIFEST in refusal(full, made.base)
    loaded = ps.load_module(full, made.base, prefill="own")
    assert loaded.architecture == made.base.architecture
    for path, array in expected.items():
        np.testing.assert_array_equal(loaded.params[path], array)
    decode = ps.TaskModules(made.base, prefill="own")
    decode.add_task("tuned", full)
    with pytest.raises(PshareError, match=MANIFEST):
        ps.TaskModules(made.base).add_task("tuned", full)
    # The base's own folder is such a fine-tune, and shares the base's arrays.
    assert ps.load_module(made.folder, made.base, prefill="own").params is made.base.params


def test_own_prefill_checks_base_tokenizer_and_architecture(made, full, tmp_path):
    def own(folder: Path | str, base: ps.Model = made.base) -> str:
        return refusal(folder, base, prefill="own")

    assert "nowhere/to/be/found" in own("nowhere/to/be/found")
    other = ps.load(tiny_folder("llama", tmp_path / "other", seed=1, **SMALL))
    assert "base_fingerprint" in own(made.full, other)
    assert "architecture" in own(tiny_folder("llama", tmp_path / "deeper", num_hidden_layers=3))
    edit_json(full / MANIFEST, tokenizer="0" * 64)
    assert "tokenizer" in own(full)
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in own(tmp_path / "empty")


def test_folder_that_is_missing_or_has_no_manifest(made):
    assert f"{made.folder} has no {MANIFEST}" in refusal(made.folder, made.base)
    assert "nowhere/to/be/found" in refusal("nowhere/to/be/found", made.base)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "readable"),
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ({"kind": "dora"}, "kind must be full or lora, not 'dora'"),
        ({"prefill": "theirs"}, "prefill must be base or own, not 'theirs'"),
        ({"version": 2}, "version must be 1, not 2"),
        ({"extra": 1}, "extra"),
        ({"base_fingerprint": None}, "base_fingerprint"),
        ({"base_fingerprint": 5}, "base_fingerprint"),
        ({"tokenizer": ["x"]}, "tokenizer"),
        ({"kind": None}, "kind"),
        ({"kind": ["full"]}, "kind"),
    ],
)
def test_faults_of_the_manifest_are_named(made, full, content, part):
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
    assert "architecture" in refusal(full, made.base)


def test_one_error_lists_all_faults_of_tensors(made, full):
    tensors = load_file(full / SINGLE_FILE)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.norm.weight"] = np.zeros(63, np.float32)
    save_file(tensors, full / SINGLE_FILE)
    message = refusal(full, made.base)
    for part in (
        str(full),
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.layers.7.mlp.up_proj.weight belongs to no parameter",
        "model.norm.weight has shape [63] instead of [64]",
    ):
        assert part in message


def test_module_with_a_head_of_its_own(made, full):
    """A module with an untied head on a tied base keeps its head, as in transformers."""
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
