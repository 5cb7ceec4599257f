"""GGUF files as Hugging Face checkpoints: the original model's names, row order, norm convention and values.

`sources.open_source` opens a .gguf with `GGUFFile`. Quantised tensors become float32; float16 and bfloat16 stay. It
undoes the changes of llama.cpp's converter, which permutes the q and k rows of llama and adds 1 to Gemma's norms.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from pshare_jax.errors import PshareError
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.weights.gguf_config import build_config, read_architecture
from pshare_jax.weights.gguf_header import GGUFTensor, read_header

TENSOR_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K")
_PLAIN_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_CHUNK_BYTES = 16_000_000

_ROPE_FACTORS = "rope_freqs.weight"
_EMBEDDING = "token_embd.weight"
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_GEMMA3_LAYER_NAMES = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYER_PATTERN = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_TOP_PATTERN = re.compile(r"(\w+)\.(weight|bias)")


class GGUFFile:
    """An opened .gguf file (a `Checkpoint`)."""

    def __init__(self, path: str | Path) -> None:
        """Parse the header and check all that needs no tensor values; PshareError names the fault."""
        self.path = Path(path)
        header = read_header(self.path)
        self._metadata = header.metadata
        self._architecture = read_architecture(self.path, header.metadata)
        _check_types(self.path, header.tensors)
        _check_sizes(self.path, header.tensors)
        self._tensors = dict(header.tensors)
        rope_factors = None
        if self._architecture == "llama" and _ROPE_FACTORS in self._tensors:
            rope_factors = _read_values(self.path, self._tensors.pop(_ROPE_FACTORS))
        self._stored_names = _hf_names(self.path, self._architecture, self._tensors)
        if _EMBEDDING not in self._tensors:
            raise PshareError(
                f"{self.path} has no tensor {_EMBEDDING}, so it is not a whole model; give the .gguf of a whole model."
            )
        vocab_size = self._tensors[_EMBEDDING].shape[0]
        self.config: Mapping[str, Any] = build_config(
            self.path, header.metadata, self._tensors.keys(), vocab_size, rope_factors
        )
        self.generation_config: Mapping[str, Any] = _generation_config(header.metadata)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the metadata contain a tokenizer."""
        return any(key.startswith("tokenizer.") for key in self._metadata)

    def names(self) -> list[str]:
        """Hugging Face tensor names in file order."""
        return list(self._stored_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, [out, in]."""
        return self._tensors[self._stored_name(name)].shape

    def read(self, name: str) -> np.ndarray:
        """One tensor in Hugging Face row order and norm convention: float16 or bfloat16 as stored, else float32."""
        stored = self._stored_name(name)
        values = _read_values(self.path, self._tensors[stored])
        if self._architecture == "llama" and ".attn_q." in stored:
            return _unpermute(self.path, stored, values, self.config["num_attention_heads"])
        if self._architecture == "llama" and ".attn_k." in stored:
            return _unpermute(self.path, stored, values, self.config["num_key_value_heads"])
        if self._architecture == "gemma3" and stored.endswith("norm.weight"):
            return values.astype(np.float32) - np.float32(1.0)
        return values

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the metadata."""
        return Tokenizer.from_gguf(
            {key: value for key, value in self._metadata.items() if key.startswith("tokenizer.")}
        )

    def _stored_name(self, name: str) -> str:
        stored = self._stored_names.get(name)
        if stored is None:
            raise PshareError(f"{self.path} has no tensor {name}.")
        return stored


def _check_types(path: Path, tensors: Mapping[str, GGUFTensor]) -> None:
    """Refuse unsupported tensor types; the error names all of them."""
    wrong = sorted({item.type_name for item in tensors.values()} - set(TENSOR_TYPES))
    if wrong:
        raise PshareError(
            f"{path} has tensors of type {', '.join(wrong)}, but only {', '.join(TENSOR_TYPES)} are supported; "
            "use another quantisation of the model."
        )


def _check_sizes(path: Path, tensors: Mapping[str, GGUFTensor]) -> None:
    """Refuse rows that are not a whole number of blocks, and tensors beyond the end of the file."""
    size = path.stat().st_size
    for name, item in tensors.items():
        block_size = GGML_QUANT_SIZES[GGMLQuantizationType(item.raw_type)][0]
        if 0 in item.shape or item.shape[-1] % block_size:
            raise PshareError(
                f"{path} is damaged: the rows of {name} are not a whole number of {item.type_name} blocks."
            )
        end = item.offset + item.num_rows * item.row_bytes
        if end > size:
            raise PshareError(
                f"{path} is cut short: tensor {name} ends at byte {end}, but the file has {size} bytes; download or "
                "copy it again."
            )


def _hf_names(path: Path, architecture: str, tensors: Mapping[str, GGUFTensor]) -> dict[str, str]:
    """Hugging Face name -> GGUF name of every tensor; the error for unknown tensors names them."""
    names = {stored: _hf_name(architecture, stored) for stored in tensors}
    unknown = [stored for stored, name in names.items() if name is None]
    if unknown:
        raise PshareError(
            f"{path} has {len(unknown)} unknown tensors for a {architecture} model: {', '.join(unknown[:10])}"
            f"{', ...' if len(unknown) > 10 else ''}."
        )
    return {name: stored for stored, name in names.items() if name is not None}


def _hf_name(architecture: str, stored: str) -> str | None:
    """The Hugging Face name of one tensor, if it has one."""
    if match := _LAYER_PATTERN.fullmatch(stored):
        layer, part, kind = match.groups()
        table = _GEMMA3_LAYER_NAMES if architecture == "gemma3" else _LAYER_NAMES
        return f"model.layers.{layer}.{table[part]}.{kind}" if part in table else None
    if (match := _TOP_PATTERN.fullmatch(stored)) and match[1] in _TOP_NAMES:
        return f"{_TOP_NAMES[match[1]]}.{match[2]}"
    return None


def _read_values(path: Path, tensor: GGUFTensor) -> np.ndarray:
    """A tensor's values as stored, dequantised a few rows at a time so that there is never a second whole copy."""
    dtype = _PLAIN_DTYPES.get(tensor.type_name)
    if dtype is not None:
        return np.fromfile(path, dtype=dtype, count=math.prod(tensor.shape), offset=tensor.offset).reshape(tensor.shape)
    kind = GGMLQuantizationType(tensor.raw_type)
    values = np.empty((tensor.num_rows, tensor.shape[-1]), dtype=np.float32)
    step = max(1, _CHUNK_BYTES // (4 * tensor.shape[-1]))
    for start in range(0, tensor.num_rows, step):
        rows = min(step, tensor.num_rows - start)
        packed = np.fromfile(
            path, dtype=np.uint8, count=rows * tensor.row_bytes, offset=tensor.offset + start * tensor.row_bytes
        )
        values[start : start + rows] = dequantize(packed.reshape(rows, tensor.row_bytes), kind)
    return values.reshape(tensor.shape)


def _unpermute(path: Path, stored: str, values: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of each head's rotary halves, in weights [heads * head_dim, D] or biases."""
    if values.shape[0] % (2 * num_heads):
        raise PshareError(f"{path} is damaged: {num_heads} heads cannot share the {values.shape[0]} rows of {stored}.")
    pairs = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """All end tokens, if the file names an end-of-turn token besides its end-of-text token."""
    ends = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot")]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    return {"eos_token_id": found} if len(found) > 1 else {}
