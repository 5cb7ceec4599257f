"""The base fingerprint: what it must not depend on, what must change it, and the cache of tensor hashes."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import edit_json, tiny_folder

import pshare_jax as ps
import pshare_jax.weights.load as load_module
from pshare_jax.weights.fingerprint import CACHE_NAME
from pshare_jax.weights.safetensors import INDEX_FILE, SINGLE_FILE, write_safetensors

ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny folder whose float32 weights all have bfloat16 values."""
    folder = tiny_folder("llama", tmp_path / "model", **ONE_LAYER)
    weights = {
        name: x.astype(ml_dtypes.bfloat16).astype(np.float32) for name, x in load_file(folder / SINGLE_FILE).items()
    }
    save_file(weights, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


@pytest.fixture
def hashed(monkeypatch) -> list[int]:
    """The sizes of the tensors hashed during the test."""
    sizes: list[int] = []
    plain: Callable = load_module.tensor_hash
    monkeypatch.setattr(load_module, "tensor_hash", lambda values: sizes.append(values.size) or plain(values))
    return sizes


def rewrite(folder, change, **options):
    """Write the folder's tensors anew, changed by `change(name, values)`."""
    tensors = load_file(folder / SINGLE_FILE)
    write_safetensors(folder, ((name, change(name, values)) for name, values in tensors.items()), **options)


def test_stored_dtype_and_sharding_do_not_matter(folder):
    expected = ps.load(folder).fingerprint
    rewrite(folder, lambda name, values: values.astype("bfloat16"))
    assert ps.load(folder).fingerprint == expected
    rewrite(folder, lambda name, values: values, max_shard_bytes=20_000)
    assert (folder / INDEX_FILE).is_file()
    assert ps.load(folder).fingerprint == expected
    assert len(expected) == 64


def test_mesh_and_run_dtype_do_not_matter(folder):
    expected = ps.load(folder).fingerprint
    assert ps.load(folder, dtype="bfloat16").fingerprint == expected
    sharded = ps.load(folder, mesh=ps.make_mesh([4, 5]))
    assert sharded.fingerprint == expected
    assert sharded.on(ps.make_mesh([0])).fingerprint == expected


def test_file_names_and_config_spelling_do_not_matter(folder, tmp_path):
    expected = ps.load(folder).fingerprint
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=12345, max_position_embeddings=1024)
    (folder / CACHE_NAME).unlink()
    assert ps.load(folder.rename(tmp_path / "elsewhere")).fingerprint == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 12346.0}},
        {"rms_norm_eps": 2e-3},
        {"hidden_act": "gelu"},
    ],
)
def test_config_fields_that_layers_read_matter(folder, changes):
    expected = ps.load(folder).fingerprint
    edit_json(folder / "config.json", **changes)
    assert ps.load(folder).fingerprint != expected


def test_one_weight_matters(folder):
    expected = ps.load(folder).fingerprint

    def nudge(name, values):
        if name == "model.layers.0.mlp.down_proj.weight":
            values[3, 5] += 0.01
        return values

    rewrite(folder, nudge)
    assert ps.load(folder).fingerprint != expected


def test_swapped_tensors_matter(folder):
    expected = ps.load(folder).fingerprint
    tensors = load_file(folder / SINGLE_FILE)
    names = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    write_safetensors(folder, tensors.items())
    assert ps.load(folder).fingerprint != expected


def test_hashes_are_cached_beside_the_weights(folder, hashed):
    first = ps.load(folder)
    assert len(hashed) == len(first.params)
    hashed.clear()
    assert ps.load(folder).fingerprint == first.fingerprint
    assert ps.load(folder, dtype="bfloat16", mesh=ps.make_mesh([1, 2])).fingerprint == first.fingerprint
    assert not hashed


def test_cache_is_invalid_after_a_file_changes(folder, hashed):
    first = ps.load(folder)
    hashed.clear()
    # The size stays the same; only the change time differs.
    weights = folder / SINGLE_FILE
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    second = ps.load(folder)
    assert len(hashed) == len(first.params)
    assert second.fingerprint != first.fingerprint


def test_cache_is_invalid_after_files_are_added_or_removed(folder, hashed):
    first = ps.load(folder)
    hashed.clear()
    rewrite(folder, lambda name, values: values, max_shard_bytes=20_000)
    assert ps.load(folder).fingerprint == first.fingerprint
    assert len(hashed) == len(first.params)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"files": 1}', '{"files": null, "hashes": 3}', "half a ca\udcff"]
)
def test_broken_cache_is_ignored_and_replaced(folder, content, hashed):
    first = ps.load(folder)
    cache = folder / CACHE_NAME
    good = cache.read_bytes()
    cache.write_bytes(content.encode(errors="surrogateescape"))
    assert ps.load(folder).fingerprint == first.fingerprint
    assert cache.read_bytes() == good


def test_cache_with_malformed_hashes_is_ignored(folder):
    first = ps.load(folder)
    cache = folder / CACHE_NAME
    for hashes in (3, ["a"], {"embedding.weight": 7}):
        edit_json(cache, hashes=hashes)
        assert ps.load(folder).fingerprint == first.fingerprint
    content = json.loads(cache.read_text())
    del content["hashes"]
    cache.write_text(json.dumps(content))
    assert ps.load(folder).fingerprint == first.fingerprint


def test_unwritable_folder(folder):
    """Root may write anywhere, so a folder blocks the cache's temporary file."""
    (folder / f"{CACHE_NAME}.part").mkdir()
    assert ps.load(folder).fingerprint == ps.load(folder).fingerprint
    assert not (folder / CACHE_NAME).exists()


def test_read_only_file_system(folder, monkeypatch):
    """A read-only file system raises even when a missing file is removed."""

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert ps.load(folder).fingerprint


def test_cache_holds_only_names_and_hashes(folder):
    model = ps.load(folder)
    content = json.loads((folder / CACHE_NAME).read_text())
    assert set(content["hashes"]) == set(model.params)
    assert all(len(value) == 64 for value in content["hashes"].values())


def test_tied_and_untied_differ(tmp_path):
    tied = ps.load(tiny_folder("qwen3", tmp_path / "tied", tie_word_embeddings=True, **ONE_LAYER))
    untied = ps.load(tiny_folder("qwen3", tmp_path / "untied", **ONE_LAYER))
    assert tied.fingerprint != untied.fingerprint
