"""Damaged, foreign and unsupported GGUF files: the error names the fault."""

import contextlib

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pshare_jax.errors import PshareError
from pshare_jax.weights.gguf import GGUFFile

REQUIRED = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
]


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_missing_key_is_named(key, name, write_tiny):
    with pytest.raises(PshareError, match=rf"{name}\.{key} is missing"):
        GGUFFile(write_tiny(name, {f"{name}.{key}": None}))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "expert_count", 8),
        ("llama", "attention.sliding_window", 4096),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.causal", False),
        ("llama", "rope.dimension_count", 4),
        ("llama", "attention.value_length", 16),
        ("qwen3", "final_logit_softcapping", 30.0),
        ("gemma3", "attn_logit_softcapping", 30.0),
        ("gemma3", "attention.sliding_window_pattern", [True]),
        ("llama", "block_count", "three"),
        ("llama", "rope.freq_base", "big"),
        ("llama", "attention.head_count", 5),
        ("llama", "attention.head_count_kv", [2, 2, 1]),
    ],
)
def test_error_names_an_unsupported_key(name, key, value, write_tiny):
    with pytest.raises(PshareError, match=rf"{name}\.{key}"):
        GGUFFile(write_tiny(name, {f"{name}.{key}": value}))


def test_unknown_architecture(write_gguf):
    with pytest.raises(PshareError, match="llama, qwen3, gemma3, not 'mamba'"):
        GGUFFile(write_gguf("mamba", {}, {}))


def test_split_file(write_tiny):
    with pytest.raises(PshareError, match="merge"):
        GGUFFile(write_tiny("llama", {"split.count": 3}))


def test_all_unsupported_types_are_named(write_gguf):
    raw = {
        "token_embd.weight": (np.zeros((2, 84), np.uint8), gguf.GGMLQuantizationType.Q2_K),
        "output.weight": (np.zeros((2, 176), np.uint8), gguf.GGMLQuantizationType.Q5_K),
        "output_norm.weight": (np.zeros((1, 34), np.uint8), gguf.GGMLQuantizationType.Q8_0),
    }
    with pytest.raises(PshareError, match=r"Q2_K, Q5_K.* F32, .* Q6_K"):
        GGUFFile(write_gguf("llama", {}, {}, raw))


def test_unknown_tensors_are_named(write_tiny):
    with pytest.raises(PshareError, match=r"2 .*blk\.0\.ssm_a\.weight, v\.patch\.weight"):
        GGUFFile(
            write_tiny(
                "llama",
                tensors={"blk.0.ssm_a.weight": np.ones(4, np.float32), "v.patch.weight": np.ones(4, np.float32)},
            )
        )


def test_vocabulary_only(write_tiny):
    with pytest.raises(PshareError, match=r"token_embd\.weight"):
        GGUFFile(write_tiny("llama", tensors={"token_embd.weight": None}))


def test_unknown_name_in_read(write_tiny):
    with pytest.raises(PshareError, match="nonsense"):
        GGUFFile(write_tiny("llama")).read("nonsense")


def test_missing_file(tmp_path):
    with pytest.raises(PshareError, match="absent"):
        GGUFFile(tmp_path / "absent.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(100), b"<html>not found</html>" * 5])
def test_not_a_gguf(content, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(PshareError, match="not a GGUF file"):
        GGUFFile(path)


def test_other_versions(tmp_path):
    path = tmp_path / "model.gguf"
    for version in (b"\x01\0\0\0", b"\0\0\0\x03"):
        path.write_bytes(b"GGUF" + version + bytes(40))
        with pytest.raises(PshareError, match="version"):
            GGUFFile(path)


@pytest.mark.parametrize("kept", [30, 400, 3000, -1])
def test_cut_short(kept, write_tiny):
    path = write_tiny("llama")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(PshareError, match="cut short"):
        GGUFFile(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_never_ends_in_a_traceback(data, write_tiny, tmp_path):
    """With random bytes in its header a file opens or raises PshareError."""
    whole = tmp_path / "whole.bin"
    if not whole.exists():
        write_tiny("llama").rename(whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, 4000))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(patch)] = patch
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with contextlib.suppress(PshareError):
        checkpoint = GGUFFile(path)
        for name in checkpoint.names():
            assert checkpoint.read(name).shape == checkpoint.shape(name)
