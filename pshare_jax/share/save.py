"""Save a model as a Hugging Face folder that transformers can load: config.json, safetensors, tokenizer files.

`decode_module.save_module` and users call it. Tensors are copied to the host one file shard at a time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.model.config import FAMILIES
from pshare_jax.share.model import Model
from pshare_jax.weights.names import file_name, table
from pshare_jax.weights.safetensors import write_safetensors


def save_folder(folder: str | Path, model: Model) -> None:
    """Write the model into `folder` (created if missing) in its run dtype; a tied model's file has no head tensor."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", hf_config(model))
    _write_json(folder / "generation_config.json", {"eos_token_id": sorted(model.stop_ids)})
    model.tokenizer.save(folder)
    write_safetensors(folder, _tensors(model))


def hf_config(model: Model) -> dict[str, Any]:
    """The source's config.json with the fields that may have changed since: architecture names, tying, dtype."""
    family = next(family for family in FAMILIES if family.name == model.config.family)
    return {
        **model.hf_config,
        "architectures": [family.architectures[0]],
        "model_type": family.model_types[0],
        "tie_word_embeddings": model.config.tied,
        "dtype": model.architecture.dtype,
    }


def _tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    for entry in table(model.config):
        values = np.asarray(model.params[entry.path])
        yield file_name(entry), np.ascontiguousarray(values.T if entry.transpose else values)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
