"""`load`: parameters, tied heads as in transformers, end tokens, errors (A4-01, 02, 11, 15)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from reference import hf_logits, load_hf
from safetensors.torch import load_file, save_file
from tiny import assert_close, edit_json, random_tokens, tiny_folder

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.weights.safetensors import SINGLE_FILE

TOKENS = random_tokens(0, 1, 20)
SMALL = {"num_hidden_layers": 1, "std": 0.1}


def edit_tensors(folder, change):
    """Change a folder's tensors (name -> tensor) in place."""
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE_FILE, {"format": "pt"})


def test_tied_file_without_head(tmp_path):
    folder = tiny_folder("llama", tmp_path, **SMALL)
    assert "lm_head.weight" not in load_file(folder / SINGLE_FILE)
    model = ps.load(folder)
    assert model.config.tied
    assert "head" not in model.params
    assert_close(model.logits(TOKENS), hf_logits(load_hf(folder), TOKENS))


def test_tied_file_with_an_equal_head(tmp_path):
    folder = tiny_folder("llama", tmp_path, **SMALL)
    plain = ps.load(folder)
    edit_tensors(folder, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"].clone()}))
    model = ps.load(folder)
    assert model.config.tied
    assert model.fingerprint == plain.fingerprint
    np.testing.assert_array_equal(model.logits(TOKENS), plain.logits(TOKENS))


def test_tied_file_with_another_head(tmp_path):
    """A different head takes precedence over the config, as in transformers, with a warning."""
    folder = tiny_folder("llama", tmp_path, **SMALL)
    plain = ps.load(folder)
    edit_tensors(folder, lambda x: x.update({"lm_head.weight": x["model.embed_tokens.weight"] + 0.1}))
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs"):
        model = ps.load(folder)
    assert not model.config.tied
    assert model.fingerprint != plain.fingerprint
    expected = hf_logits(load_hf(folder), TOKENS)
    assert_close(model.logits(TOKENS), expected)
    assert np.abs(expected - np.asarray(plain.logits(TOKENS))).max() > 0.1


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_multimodal_gemma(prefix, tmp_path):
    """A4-15: three prefixes, a nested text_config, vision tensors."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "std": 0.1}
    folder = tiny_folder("gemma3", tmp_path, **layers)
    plain = ps.load(folder)

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace("model.", prefix, 1)] = tensors.pop(name)
        tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(3)
        tensors["model.multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(3)

    edit_tensors(folder, rename)
    text = json.loads((folder / "config.json").read_text())
    text.pop("architectures")
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    (folder / "config.json").write_text(json.dumps({**nested, "eos_token_id": [1, 106]}))
    model = ps.load(folder)
    assert model.config == plain.config
    assert model.fingerprint == plain.fingerprint
    assert model.hf_config == text
    assert {1, 106, 317, 319} <= model.stop_ids
    np.testing.assert_array_equal(model.logits(TOKENS), plain.logits(TOKENS))


@pytest.mark.parametrize(("dtype", "stored"), [("float32", ml_dtypes.bfloat16), ("bfloat16", np.float32)])
def test_run_dtype(dtype, stored, tmp_path):
    folder = tiny_folder("qwen3", tmp_path / "model", num_hidden_layers=1, dtype=stored)
    model = ps.load(folder, dtype=dtype)
    assert {array.dtype for array in model.params.values()} == {jnp.dtype(dtype)}
    assert model.architecture.dtype == dtype
    expected = load_file(folder / SINGLE_FILE)["model.layers.0.self_attn.k_proj.weight"].T.to(torch.float32).numpy()
    np.testing.assert_array_equal(
        np.asarray(model.params["layers.0.attention.k.kernel"], np.float32),
        np.asarray(jnp.asarray(expected, dtype), np.float32),
    )


def test_default_dtype_on_cpu_is_float32(tmp_path):
    folder = tiny_folder("llama", tmp_path / "model", num_hidden_layers=1, dtype=ml_dtypes.bfloat16)
    assert ps.load(folder).architecture.dtype == "float32"


def test_progress_goes_to_one(tmp_path):
    seen: list[float] = []
    ps.load(tiny_folder("llama", tmp_path, **SMALL), progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert len(seen) > 5


def test_end_set_is_a_union(tmp_path):
    folder = tiny_folder("qwen3", tmp_path, **SMALL)
    tokenizer_eos = ps.load(folder).tokenizer.eos_ids
    edit_json(folder / "config.json", eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7]}))
    assert ps.load(folder).stop_ids == {5, 6, 7} | tokenizer_eos
    (folder / "generation_config.json").unlink()
    edit_json(folder / "config.json", eos_token_id=None)
    assert ps.load(folder).stop_ids == tokenizer_eos


def test_errors(tmp_path):
    folder = tiny_folder("llama", tmp_path, **SMALL)
    for call, part in (
        (lambda: ps.load(folder, dtype="float64"), "float32, bfloat16, not 'float64'"),
        (lambda: ps.load(folder, mesh=ps.make_mesh([0, 1, 2])), "tp 3 does not divide the model's 4 query heads"),
        (lambda: ps.load(tmp_path / "nowhere"), "nowhere"),
    ):
        with pytest.raises(PshareError, match=part):
            call()
    edit_json(folder / "config.json", architectures=["MambaForCausalLM"])
    with pytest.raises(PshareError, match="MambaForCausalLM"):
        ps.load(folder)


@pytest.mark.parametrize(
    ("tokens", "part"),
    [
        ([1, 2, 3], r"\[batch, length\], not \[3\]"),
        ([[1, 320]], "0 to 319"),
        ([[-1, 3]], "0 to 319"),
        ([[1 << 40]], "0 to 319"),
        ([[1.5, 2.0]], "integers"),
        ([[1, 2], [3]], r"\[batch, length\]"),
        ([["a"]], "integers"),
    ],
)
def test_tokens_of_wrong_shape_or_range(tokens, part, tiny_folders):
    model = ps.load(tiny_folders["llama"])
    with pytest.raises(PshareError, match=part):
        model.logits(tokens)


LOAD_AND_MEASURE = """
import sys
import pshare_jax as ps
from pshare_jax.model.architecture import nbytes

def memory(kind):
    # Not ru_maxrss: a new process inherits its parent's peak.
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

tiny, big = sys.argv[1:]
ps.load(tiny)
before = memory("VmRSS")
model = ps.load(big)
print((memory("VmHWM") - before) / nbytes(model.params), nbytes(model.params))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_of_a_large_model(tmp_path, tiny_folders):
    """Peak RSS grows by at most 1.3 times the parameters' size: one tensor at a time is beside them."""
    folder = tmp_path / "big"
    big_folder(folder, tiny_folders["llama"])
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(tiny_folders["llama"]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(folder)
    ratio, size = map(float, done.stdout.split())
    assert size > 1e9
    assert ratio < 1.3, f"{ratio:.2f} times the parameters' {size / 1e9:.2f} GB"


def big_folder(folder: Path, tiny: Path) -> None:
    """A Llama folder of 1.1 GB in float32, its tensors written one at a time."""
    from pshare_jax.model.config import ModelConfig
    from pshare_jax.weights.names import file_name, table
    from pshare_jax.weights.safetensors import write_safetensors

    content = json.loads((tiny / "config.json").read_text())
    content |= {"hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 16, "head_dim": 96}
    content |= {"num_hidden_layers": 8, "num_key_value_heads": 8}
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(content))
    draw = np.random.default_rng(0)
    entries = table(ModelConfig.from_hf(content))
    write_safetensors(folder, ((file_name(entry), draw.random(entry.shape, np.float32)) for entry in entries))


@pytest.mark.parametrize("eos", ["2", "</s>", True, -1, [None], [2.0], {"a": 1}, [[2]]])
def test_end_ids_must_be_token_ids(tmp_path, eos):
    folder = tiny_folder("llama", tmp_path, **SMALL)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(PshareError, match="eos_token_id"):
        ps.load(folder)
