"""GGUF metadata -> the fields of a Hugging Face config.json, one architecture at a time.

`gguf.GGUFFile` is the only caller. A missing required key, or a key that asks for a computation which the architecture
does not do in transformers, is an error that names the key. The only defaults are the format's own (GGUF's values for
absent keys, llama.cpp's fixed values for gemma3).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.errors import PshareError

_HF_WORDS: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
ARCHITECTURES = tuple(_HF_WORDS)

# llama.cpp's fixed values for gemma3; the keys of newer files override them.
_GEMMA3_PATTERN = 6
_GEMMA3_LOCAL_THETA = 10000.0
_GEMMA3_27B_LAYERS = 62

# Keys of computations that the architectures above do not have: the value that means "off".
_FOREIGN_KEYS: Mapping[str, Any] = {
    "expert_count": 0,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "attn_logit_softcapping": 0.0,
}

# Keys with which llama.cpp changes YaRN's cosines and sines: the values that leave them as in transformers.
_YARN_OFF: Mapping[str, float] = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}


@dataclass(frozen=True)
class _Metadata:
    """The metadata of one architecture, by keys without its prefix; errors name the file."""

    path: Path
    architecture: str
    values: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """The value of `<architecture>.key`, or None."""
        return self.values.get(f"{self.architecture}.{key}")

    def integer(self, key: str) -> int:
        """A required integer of at least 1."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.fault(key, f"is {value!r}, not a positive integer")
        return value

    def number(self, key: str) -> float:
        """A required finite number."""
        value = self._required(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fault(key, f"is {value!r}, not a number")
        return float(value)

    def fault(self, key: str, what: str) -> PshareError:
        """An error about one key, for the caller to raise."""
        return PshareError(f"{self.path} cannot be used: its metadata key {self.architecture}.{key} {what}.")

    def _required(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise self.fault(key, "is missing")
        return value


def read_architecture(path: Path, metadata: Mapping[str, Any]) -> str:
    """The file's architecture; an unknown architecture or a part of a split file is an error."""
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise PshareError(f"{path}: the architecture must be one of {', '.join(ARCHITECTURES)}, not {architecture!r}.")
    if metadata.get("split.count", 1) not in (0, 1):
        raise PshareError(f"{path} is a part of a split GGUF; merge the parts with llama-gguf-split --merge.")
    return architecture


def build_config(
    path: Path,
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    vocab_size: int,
    rope_factors: np.ndarray | None,
) -> dict[str, Any]:
    """The model's config.json as in a Hugging Face folder.

    Args:
        path: the file, for errors.
        metadata: all keys of the file.
        tensor_names: GGUF names, which show whether there are biases and an untied head.
        vocab_size: rows of the embedding.
        rope_factors: rope_freqs.weight, [head_dim / 2]; llama.cpp stores llama3 rope scaling in it.
    """
    architecture = read_architecture(path, metadata)
    keys = _Metadata(path, architecture, metadata)
    _refuse_foreign(keys)
    config = _common_fields(keys, tensor_names, vocab_size)
    scaling = _rope_scaling(keys)
    if rope_factors is not None:
        if scaling is not None:
            raise keys.fault("rope.scaling.type", "conflicts with the tensor rope_freqs.weight; keep one of them")
        scaling = llama3_scaling(path, rope_factors, config["rope_theta"], config["max_position_embeddings"])
    if scaling is not None:
        config["rope_scaling"] = scaling
    if architecture == "gemma3":
        config.update(_gemma3_fields(keys, config))
    return config


def _common_fields(keys: _Metadata, tensor_names: Collection[str], vocab_size: int) -> dict[str, Any]:
    """The fields of all three architectures."""
    hf_class, model_type = _HF_WORDS[keys.architecture]
    activation = "gelu_pytorch_tanh" if keys.architecture == "gemma3" else "silu"
    num_heads = keys.integer("attention.head_count")
    num_kv_heads = num_heads if keys.get("attention.head_count_kv") is None else keys.integer("attention.head_count_kv")
    config = {
        "architectures": [hf_class],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": _head_dim(keys, num_heads),
        "hidden_activation" if keys.architecture == "gemma3" else "hidden_act": activation,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base"),
        "attention_bias": any(name.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias")) for name in tensor_names),
        "tie_word_embeddings": "output.weight" not in tensor_names,
    }
    if keys.architecture == "llama":
        config["mlp_bias"] = any(name.endswith("ffn_up.bias") for name in tensor_names)
    for role in ("bos", "eos"):
        token_id = keys.values.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None:
            config[f"{role}_token_id"] = token_id
    return config


def _head_dim(keys: _Metadata, num_heads: int) -> int:
    """attention.key_length, else embedding / heads; partial rotary embeddings and other value sizes are errors."""
    if keys.get("attention.key_length") is not None:
        head_dim = keys.integer("attention.key_length")
    else:
        hidden = keys.integer("embedding_length")
        if hidden % num_heads:
            raise keys.fault(
                "attention.head_count", f"is {num_heads}, which does not divide the embedding length {hidden}"
            )
        head_dim = hidden // num_heads
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.get(key) not in (None, head_dim):
            raise keys.fault(key, f"is {keys.get(key)}, but only the head size {head_dim} is supported")
    return head_dim


def _refuse_foreign(keys: _Metadata) -> None:
    """Refuse keys of computations that the architecture does not have."""
    off = dict(_FOREIGN_KEYS)
    if keys.architecture != "gemma3":
        off["attention.sliding_window"] = 0
        off["final_logit_softcapping"] = 0.0
    for key, value in off.items():
        if keys.get(key) is not None and keys.get(key) != value:
            raise keys.fault(key, f"is {keys.get(key)}, but only {value} is supported for {keys.architecture}")


def _rope_scaling(keys: _Metadata) -> dict[str, Any] | None:
    """rope_scaling in Hugging Face form; types other than linear and yarn keep their name, and `ModelConfig` refuses them."""
    kind = keys.get("rope.scaling.type")
    factor_key = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"
    if kind == "none" or (kind is None and keys.get(factor_key) is None):
        return None
    if kind in (None, "linear"):
        factor = keys.number(factor_key if kind is None else "rope.scaling.factor")
        return None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}
    scaling: dict[str, Any] = {"rope_type": kind}
    if kind != "yarn":
        return scaling
    for key, off in _YARN_OFF.items():
        if keys.get(key) not in (None, off):
            raise keys.fault(key, f"is {keys.get(key)}, but only {off} is supported")
    scaling["factor"] = keys.number("rope.scaling.factor")
    if keys.get("rope.scaling.original_context_length") is not None:
        scaling["original_max_position_embeddings"] = keys.integer("rope.scaling.original_context_length")
    for name in ("beta_fast", "beta_slow"):
        if keys.get(f"rope.scaling.yarn_{name}") is not None:
            scaling[name] = keys.number(f"rope.scaling.yarn_{name}")
    return scaling


def _gemma3_fields(keys: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """Sliding windows, the local rope, the attention scale and the soft cap of Gemma 3."""
    num_layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    # llama.cpp scales 27B by embedding / heads and all other sizes by head size.
    is_27b = num_layers == _GEMMA3_27B_LAYERS
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else head_dim
    fields: dict[str, Any] = {
        "layer_types": _layer_types(keys, num_layers),
        "sliding_window": keys.integer("attention.sliding_window") if keys.get("attention.sliding_window") else None,
        "rope_local_base_freq": _GEMMA3_LOCAL_THETA,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if keys.get("final_logit_softcapping"):
        fields["final_logit_softcapping"] = keys.number("final_logit_softcapping")
    if keys.get("rope.freq_base_swa") is not None:
        fields["rope_local_base_freq"] = keys.number("rope.freq_base_swa")
    return fields


def _layer_types(keys: _Metadata, num_layers: int) -> list[str]:
    """Each layer's "sliding_attention" or "full_attention"; without a window all layers have full attention."""
    if not keys.get("attention.sliding_window"):
        return ["full_attention"] * num_layers
    pattern = keys.get("attention.sliding_window_pattern")
    if pattern is None:
        pattern = _GEMMA3_PATTERN
    if isinstance(pattern, list) and len(pattern) == num_layers:
        sliding = [bool(item) for item in pattern]
    elif isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 1:
        sliding = [(layer + 1) % pattern != 0 for layer in range(num_layers)]
    else:
        raise keys.fault("attention.sliding_window_pattern", f"is {pattern!r}, which does not fit {num_layers} layers")
    return ["sliding_attention" if item else "full_attention" for item in sliding]


def llama3_scaling(path: Path, factors: np.ndarray, theta: float, max_len: int) -> dict[str, Any] | None:
    """The llama3 rope_scaling whose frequency divisors are `factors` [head_dim / 2] to 1e-5; None if all are 1.

    llama.cpp stores only the divisors, so this searches for the parameters: the factor is the largest divisor, the
    original length a power of two (8192 first), the low and high frequency factors Meta's 1 and 4, 1 and 2, or 1 and 8.
    """
    factors = np.asarray(factors, dtype=np.float64)
    if np.allclose(factors, 1.0, rtol=0, atol=1e-5):
        return None
    # Rounded, because the stored 8.0 may be off by its last bit.
    factor = float(f"{factors.max():.6g}")
    lengths = [8192, *(2**k for k in range(4, 21) if 2**k <= max_len and 2**k != 8192)]
    for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0)):
        for length in lengths:
            divisors = _llama3_divisors(len(factors), theta, factor, low, high, length)
            if np.allclose(divisors, factors, rtol=1e-5, atol=0):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": length,
                }
    raise PshareError(f"{path} cannot be used: its tensor rope_freqs.weight is not a known llama3 rope scaling.")


def _llama3_divisors(count: int, theta: float, factor: float, low: float, high: float, original_len: int) -> np.ndarray:
    """The divisors of llama3 scaling for each of `count` rope frequencies (Llama 3.1's rule, as in transformers)."""
    frequencies = theta ** (-np.arange(count, dtype=np.float64) / count)
    turns = original_len * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
