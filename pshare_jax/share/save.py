"""Save a model as a Hugging Face folder that transformers can load: config.json, safetensors, tokenizer files.

`decode_module.save_module` and users call `save_folder`, which copies tensors to the host one file shard at a time; quantize.py
calls `write_folder`.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.model.architecture import Architecture
from pshare_jax.model.config import FAMILIES
from pshare_jax.model.quantization import quantization_config
from pshare_jax.share.model import Model
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.weights.names import file_name, table
from pshare_jax.weights.safetensors import write_safetensors


def save_folder(folder: str | Path, model: Model) -> None:
    """Write the model into `folder` (created if missing) in its run dtype; a tied model's file has no head tensor."""
    config = hf_config(model.hf_config, model.architecture)
    write_folder(Path(folder), config, model.stop_ids, model.tokenizer, _tensors(model))


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    stop_ids: Collection[int],
    tokenizer: Tokenizer,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write the files of a model: the content of its config.json, and tensors by their names there, consumed lazily."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": sorted(stop_ids)})
    tokenizer.save(folder)
    write_safetensors(folder, tensors)


def hf_config(source: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The source's config.json with the fields that may have changed since: architecture names, tying, dtype, quantisation."""
    family = next(family for family in FAMILIES if family.name == architecture.config.family)
    form = architecture.weights
    return {
        **{name: value for name, value in source.items() if name != "quantization_config"},
        "architectures": [family.architectures[0]],
        "model_type": family.model_types[0],
        "tie_word_embeddings": architecture.config.tied,
        "dtype": architecture.dtype,
        **({"quantization_config": quantization_config(form)} if form else {}),
    }


def _tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    for entry in table(model.config, model.architecture.weights):
        values = np.asarray(model.params[entry.path])
        yield file_name(entry), np.ascontiguousarray(values.T if entry.transpose else values)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
