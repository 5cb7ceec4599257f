"""Tiny Hugging Face models, and GGUF files of them in the order and conventions of llama.cpp's converter."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

SHARED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _theta(value: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": value}


def _models() -> dict[str, Callable[[], Any]]:
    import transformers as hf

    llama = {**SHARED, "head_dim": 8, "rope_parameters": _theta(12345.0)}
    gemma_rope = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 54321.0},
        "sliding_attention": _theta(765.0),
    }
    gemma = {
        **SHARED,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": gemma_rope,
        "final_logit_softcapping": 3.0,
    }
    qwen = {**SHARED, "head_dim": 12, "rope_parameters": _theta(999.0), "tie_word_embeddings": True}
    return {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama, tie_word_embeddings=False)),
        "llama-biases": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama, attention_bias=True, mlp_bias=True)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**qwen)),
        "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**gemma)),
    }


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """Name -> a random transformers model; no parameter, norms and biases included, has its initial value."""
    import torch

    def make(name: str) -> Any:
        torch.manual_seed(0)
        model = _models()[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
        return model

    return make


def architecture_of(name: str) -> str:
    return name.split("-")[0]


def interleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's row order: in each head, row i of the first half moves to 2i, row i of the second half to 2i + 1."""
    out = np.empty_like(values)
    size = values.shape[0] // num_heads
    for head in range(num_heads):
        for row in range(size // 2):
            out[head * size + 2 * row] = values[head * size + row]
            out[head * size + 2 * row + 1] = values[head * size + size // 2 + row]
    return out


def converted_tensors(name: str, model: Any) -> dict[str, np.ndarray]:
    """The model's tensors as the converter writes them, under GGUF names."""
    architecture, config = architecture_of(name), model.config
    arch_id = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(arch_id, config.num_hidden_layers)
    out = {}
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = table.get_name(key, try_suffixes=(".weight", ".bias"))
        values = value.numpy()
        if architecture == "llama" and ".q_proj." in key:
            values = interleave(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in key:
            values = interleave(values, config.num_key_value_heads)
        if architecture == "gemma3" and key.endswith("norm.weight"):
            values = values + np.float32(1)
        out[stored] = values
    return out


def converted_metadata(name: str, config: Any) -> dict[str, Any]:
    """The converter's metadata for a tiny model."""
    architecture = architecture_of(name)
    rope = config.rope_parameters
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if architecture == "llama":
        keys |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    else:
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if architecture == "gemma3":
        keys |= {
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
            "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
            "rope.scaling.type": "linear",
            "rope.scaling.factor": rope["full_attention"]["factor"],
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    tokens = [f"t{i}" for i in range(config.vocab_size)]
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    return {f"{architecture}.{key}": value for key, value in keys.items()} | tokenizer


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a GGUF file from architecture, metadata, plain tensors and raw blocks (bytes, type)."""

    def write(
        architecture: str,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        raw: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            _add_value(writer, key, value)
        for key, values in tensors.items():
            writer.add_tensor(key, values)
        for key, (values, kind) in (raw or {}).items():
            writer.add_tensor(key, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def write_embedding(write_gguf: Callable[..., Path]) -> Callable[..., Path]:
    """A function that writes a GGUF of the required metadata and of an embedding's raw blocks (bytes, type)."""
    metadata = {
        "llama.block_count": 1,
        "llama.context_length": 8,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 8,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e4,
    }
    return lambda values, kind: write_gguf("llama", metadata, {}, {"token_embd.weight": (values, kind)})


@pytest.fixture
def write_tiny(tiny_model: Callable[[str], Any], write_gguf: Callable[..., Path]) -> Callable[..., Path]:
    """A function that writes a tiny model with some metadata and tensors changed (None: omitted)."""

    def write(name: str, metadata: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None) -> Path:
        model = tiny_model(name)
        keys = converted_metadata(name, model.config) | dict(metadata or {})
        values = converted_tensors(name, model) | dict(tensors or {})
        return write_gguf(
            architecture_of(name),
            {key: value for key, value in keys.items() if value is not None},
            {key: value for key, value in values.items() if value is not None},
        )

    return write
