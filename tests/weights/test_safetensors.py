"""Hugging Face folders: read strictly, written so that transformers can load them."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from pshare_jax.errors import PshareError
from pshare_jax.weights.safetensors import INDEX_FILE, SINGLE_FILE, SafetensorsFolder, save_tensors, write_safetensors

SHARDS = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]


def tensors():
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((4, 3)).astype(np.float32),
        "b": rng.standard_normal((2, 3, 2)).astype(np.float16),
        "c": rng.standard_normal(6).astype(ml_dtypes.bfloat16),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def single(tmp_path):
    save_file(tensors(), tmp_path / SINGLE_FILE)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    """Tensors a, b and c, each in its own shard, with an index."""
    for shard, name in zip(SHARDS, "abc", strict=True):
        save_file({name: tensors()[name]}, tmp_path / shard)
    write_index(tmp_path, dict(zip("abc", SHARDS, strict=True)))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def faults(folder):
    with pytest.raises(PshareError) as caught:
        SafetensorsFolder(folder)
    return str(caught.value)


def assert_holds(checkpoint, expected):
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, value in expected.items():
        read = checkpoint.read(name)
        assert checkpoint.shape(name) == read.shape == value.shape
        assert read.dtype == value.dtype
        assert read.flags.owndata or read.base.flags.owndata
        np.testing.assert_array_equal(read, value)


def test_single_file(single):
    checkpoint = SafetensorsFolder(single)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {}
    assert checkpoint.path == single
    assert_holds(checkpoint, tensors())


def test_sharded(sharded):
    (sharded / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (sharded / "adapter_model.safetensors").write_bytes(b"another kind of file is ignored")
    checkpoint = SafetensorsFolder(str(sharded))
    assert checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert_holds(checkpoint, {name: tensors()[name] for name in "abc"})


def test_folder_missing(tmp_path):
    assert str(tmp_path / "absent") in faults(tmp_path / "absent")


def test_empty_folder_lists_both_faults(tmp_path):
    message = faults(tmp_path)
    assert "config.json is missing" in message
    assert SINGLE_FILE in message


@pytest.mark.parametrize(("text", "named"), [("{", "not valid JSON"), ("[1]", "not a list"), ('"x"', "not a str")])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_bad_json(file, text, named, single):
    (single / file).write_text(text)
    message = faults(single)
    assert file in message
    assert named in message


def test_pickled_weights_only(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pytorch_model.bin" in faults(tmp_path)


def test_shard_without_index(sharded):
    (sharded / INDEX_FILE).unlink()
    message = faults(sharded)
    assert SHARDS[0] in message
    assert INDEX_FILE in message


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../other.safetensors"}}']
)
def test_bad_index(text, sharded):
    (sharded / INDEX_FILE).write_text(text)
    assert INDEX_FILE in faults(sharded)


def test_one_error_lists_all_faults_of_the_shards(sharded):
    save_file({"b": tensors()["b"], "a": tensors()["a"], "stray": tensors()["c"]}, sharded / SHARDS[1])
    (sharded / SHARDS[2]).unlink()
    save_file({"z": tensors()["a"]}, sharded / "model-00009-of-00009.safetensors")
    write_index(sharded, {"a": SHARDS[0], "gone": SHARDS[0], "b": SHARDS[1], "c": SHARDS[2]})
    message = faults(sharded)
    for fault in (
        f"tensor a is in {SHARDS[0]} and in {SHARDS[1]}",
        f"{SHARDS[1]} has tensor stray",
        f"names tensor gone in {SHARDS[0]}",
        f"names the shard {SHARDS[2]}, which is missing",
        "does not name the file model-00009-of-00009.safetensors",
    ):
        assert fault in message
    assert message.count(";") == 4


def test_single_file_beside_an_index_for_others(sharded):
    save_file({"a": tensors()["a"]}, sharded / SINGLE_FILE)
    assert f"does not name the file {SINGLE_FILE}" in faults(sharded)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_truncated_file_is_named(kept, single, sharded):
    for folder, name in ((single, SINGLE_FILE), (sharded, SHARDS[1])):
        (folder / INDEX_FILE).unlink(missing_ok=True)
        file = folder / name
        file.write_bytes(file.read_bytes()[:kept])
        if name != SINGLE_FILE:
            (folder / SINGLE_FILE).unlink()
            write_index(folder, dict(zip("abc", SHARDS, strict=True)))
        assert f"{name} is cut short or damaged" in faults(folder)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 500), patch=st.binary(min_size=1, max_size=8))
def test_damage_never_ends_in_a_traceback(at, patch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    save_file(tensors(), folder / SINGLE_FILE)
    (folder / "config.json").write_text("{}")
    content = bytearray((folder / SINGLE_FILE).read_bytes())
    content[at : at + len(patch)] = patch
    (folder / SINGLE_FILE).write_bytes(content)
    try:
        checkpoint = SafetensorsFolder(folder)
        for name in checkpoint.names():
            checkpoint.read(name)
    except PshareError:
        pass
    finally:
        shutil.rmtree(folder)


def test_file_cut_after_opening(single):
    checkpoint = SafetensorsFolder(single)
    (single / SINGLE_FILE).write_bytes(b"")
    with pytest.raises(PshareError, match=f"{SINGLE_FILE}.*tensor a"):
        checkpoint.read("a")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.zeros(4, dtype=torch.float8_e5m2), "F8_E5M2"),
        (torch.zeros(4, dtype=torch.int32), "I32"),
        (torch.zeros(4, dtype=torch.float64), "F64"),
    ],
)
def test_other_dtypes_are_refused_when_read(value, dtype, single):
    from safetensors.torch import save_file as save_torch

    save_torch({"odd": value, "fine": torch.ones(2)}, single / SINGLE_FILE)
    checkpoint = SafetensorsFolder(single)
    assert checkpoint.shape("odd") == (4,)
    np.testing.assert_array_equal(checkpoint.read("fine"), 1)
    with pytest.raises(PshareError, match=f"odd .* {dtype}.* F32, F16, BF16"):
        checkpoint.read("odd")


def test_unknown_name(single):
    with pytest.raises(PshareError, match="nonsense"):
        SafetensorsFolder(single).read("nonsense")


@pytest.mark.parametrize("limit", [1, 70, 10_000])
def test_written_folder_reads_back(limit, tmp_path):
    write_safetensors(tmp_path, tensors().items(), max_shard_bytes=limit)
    (tmp_path / "config.json").write_text("{}")
    assert_holds(SafetensorsFolder(tmp_path), tensors())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert (tmp_path / INDEX_FILE).exists() == (len(files) > 1)
    assert (files == [SINGLE_FILE]) == (limit == 10_000)
    for file in files:
        size = sum(value.nbytes for value in load_file(tmp_path / file).values())
        assert size <= max(limit, 48)


def test_written_views_are_made_contiguous(tmp_path):
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_safetensors(tmp_path, [("t", value.T)])
    np.testing.assert_array_equal(load_file(tmp_path / SINGLE_FILE)["t"], value.T)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_decides_who_reads_written_files(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_safetensors(tmp_path, tensors().items())
    finally:
        os.umask(before)
    assert (tmp_path / SINGLE_FILE).stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failed_save_leaves_the_older_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_tensors(file, {"a": np.ones(2, np.float32)})
    with pytest.raises(Exception, match="object"):
        save_tensors(file, {"a": np.array([object()])})
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    np.testing.assert_array_equal(load_file(file)["a"], 1)


def test_writing_replaces_older_files(tmp_path):
    write_safetensors(tmp_path, tensors().items(), max_shard_bytes=1)
    write_safetensors(tmp_path, [("a", np.ones(2, np.float32))])
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE_FILE]


def test_failed_writing_leaves_the_older_files(tmp_path):
    write_safetensors(tmp_path, [("a", np.ones(2, np.float32))])

    def failing():
        yield "a", np.zeros(2, np.float32)
        yield "b", np.zeros(2, np.float32)
        yield "a", np.zeros(2, np.float32)

    with pytest.raises(PshareError, match="tensor a"):
        write_safetensors(tmp_path, failing(), max_shard_bytes=1)
    assert [file.name for file in tmp_path.iterdir()] == [SINGLE_FILE]
    np.testing.assert_array_equal(load_file(tmp_path / SINGLE_FILE)["a"], 1)


def test_writing_consumes_tensors_lazily(tmp_path):
    """The first shard is on disk and freed before the third tensor is created."""
    on_disk = []

    def drawn():
        for name in "abc":
            on_disk.append(len(list(tmp_path.iterdir())))
            yield name, np.ones(8, np.float32)

    write_safetensors(tmp_path, drawn(), max_shard_bytes=32)
    assert on_disk == [0, 0, 1]


@pytest.mark.parametrize("limit", [4000, 10**9])
def test_transformers_loads_what_is_written(limit, tiny_model, tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    write_safetensors(tmp_path, ((k, v.numpy()) for k, v in model.state_dict().items()), max_shard_bytes=limit)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
