"""LoRA adapters in PEFT's format: adapter_config.json, adapter_model.safetensors <-> our `lora_a`, `lora_b` parameters.

`decode_module` is the only caller. Our decoder has one rank and one scale for all layers of a target, so an adapter with
several (`AdapterSettings`) is padded with zeros to the largest rank, and differences in scale go into B.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Params, is_lora
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.layers import LoraConfig
from pshare_jax.share.adapter_settings import CONFIG_FILE, INVOCATION, AdapterSettings, read_settings
from pshare_jax.share.model import Model
from pshare_jax.weights.load import device_put_tensor
from pshare_jax.weights.names import PLAIN_PREFIX, PROJECTIONS, AdapterTensor, Entry, adapter_tensors, projection_sizes
from pshare_jax.weights.safetensors import save_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


class _Pair(NamedTuple):
    """A and B of one projection, and the scale of their product."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def read_adapter(folder: Path, base: Model, settings: AdapterSettings | None = None) -> tuple[LoraConfig, Params]:
    """The adapter's shape, and its A and B on the base's mesh; one error lists all faults of the tensors."""
    settings = settings or read_settings(folder)
    pairs = _read_pairs(folder, base, settings)
    largest = max(pairs.values(), key=lambda pair: len(pair.a))
    targets = tuple(_short(path) for path in PROJECTIONS if any(name.endswith(f".{path}") for name in pairs))
    lora = LoraConfig(len(largest.a), largest.scale, targets)
    params = {}
    for entry in adapter_entries(base.config, lora):
        module, matrix = entry.path.rsplit(".", 1)
        values = np.zeros(entry.shape, np.float32)
        if module in pairs:
            values = _padded(pairs[module], matrix, lora)
        params[entry.path] = device_put_tensor(values, entry, base.config, base.mesh, base.architecture.dtype)
    return lora, params


def _padded(pair: _Pair, matrix: str, lora: LoraConfig) -> np.ndarray:
    """A or B of a projection with the adapter's rank and scale."""
    missing = lora.rank - len(pair.a)
    if matrix == "lora_a":
        return np.pad(pair.a, ((0, missing), (0, 0)))
    b = pair.b if pair.scale == lora.scale else pair.b.astype(np.float32) * (pair.scale / lora.scale)
    return np.pad(b, ((0, 0), (0, missing)))


def _read_pairs(folder: Path, base: Model, settings: AdapterSettings) -> dict[str, _Pair]:
    """A and B by the path of their projection, of all projections that the adapter changes (at least one)."""
    path = folder / WEIGHTS_FILE
    try:
        values = load_file(path)
    except (OSError, SafetensorError) as error:
        raise PshareError(f"{path} cannot be read: {error}.") from error
    found, faults = _by_module(values)
    if not any(matrix for _, matrix in found):
        raise PshareError(f"{path} has no LoRA tensors for {', '.join(PROJECTIONS.values())}.")
    usual = next((tensor.prefix for tensor in found.values() if tensor.module.startswith("layers.")), PLAIN_PREFIX)
    pairs = {}
    for ours, module, (num_in, num_out) in _projections(base.config):
        a, b = (found.pop((module, matrix), None) for matrix in ("lora_A", "lora_B"))
        name = (a.prefix if a else b.prefix if b else usual) + module
        adapts, rank = settings.adapts(name), settings.rank(name)
        if a is None and b is None and not adapts:
            continue
        if adapts is False:
            faults.append(f"{PREFIX}{name} is not among the modules that {CONFIG_FILE} names")
            continue
        for tensor, matrix, shape in ((a, "lora_A", (rank, num_in)), (b, "lora_B", (num_out, rank))):
            if tensor is None:
                faults.append(f"{PREFIX}{name}.{matrix}.weight is missing")
            elif values[tensor.name].shape != shape:
                faults.append(f"{tensor.name} has shape {list(values[tensor.name].shape)} instead of {list(shape)}")
        if a is not None and b is not None:
            pairs[ours] = _Pair(values[a.name], values[b.name], settings.scale(name))
    faults += [f"{tensor.name} belongs to no projection" for tensor in found.values()]
    if faults:
        raise PshareError(f"{path} does not fit the base: {'; '.join(faults[:12])}.")
    return pairs


def _by_module(names: Iterable[str]) -> tuple[dict[tuple[str, str], AdapterTensor], list[str]]:
    """The tensors by module and matrix, and the faults of those that stand twice under different names."""
    found: dict[tuple[str, str], AdapterTensor] = {}
    faults = []
    for tensor in adapter_tensors(names):
        place = tensor.module, tensor.matrix
        if place in found:
            faults.append(f"{tensor.name} and {found[place].name} are the same parameter")
        found[place] = tensor
    return found, faults


def write_adapter(
    folder: Path,
    lora: LoraConfig,
    params: Params,
    config: ModelConfig,
    class_prefix: str = PLAIN_PREFIX,
    invocation: Sequence[int] = (),
    base_name: str | None = None,
) -> None:
    """Write A and B of all targets in PEFT's format; alpha is stored as scale times rank.

    `class_prefix` is that of the base's modules in transformers, `invocation` that of an activated LoRA, `base_name` the
    base's name on the hub, by which PEFT loads it.
    """
    names = sorted(PROJECTIONS[path].split(".")[1] for path in PROJECTIONS if _short(path) in lora.targets)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": names if class_prefix == PLAIN_PREFIX else _only_below(class_prefix, names),
        **({INVOCATION: list(invocation)} if invocation else {}),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {
        entry.name: np.ascontiguousarray(np.asarray(params[entry.path]).T)
        for entry in adapter_entries(config, lora, class_prefix)
    }
    assert len(tensors) == sum(map(is_lora, params))
    save_tensors(folder / WEIGHTS_FILE, tensors)


def _only_below(class_prefix: str, names: Sequence[str]) -> str:
    """A regular expression of the language model's projections: the vision part has projections of the same names."""
    return rf"{re.escape(class_prefix)}layers\.\d+\.\w+\.({'|'.join(names)})"


def adapter_entries(config: ModelConfig, lora: LoraConfig, class_prefix: str = PLAIN_PREFIX) -> list[Entry]:
    """All A and B of an adapter: our path, PEFT's tensor name, shape in files (A `[rank, in]`, B `[out, rank]`)."""
    entries = []
    for ours, module, (num_in, num_out) in _projections(config):
        if _short(ours.split(".", 2)[2]) in lora.targets:
            theirs = f"{PREFIX}{class_prefix}{module}"
            entries.append(Entry(f"{ours}.lora_a", f"{theirs}.lora_A.weight", (lora.rank, num_in), transpose=True))
            entries.append(Entry(f"{ours}.lora_b", f"{theirs}.lora_B.weight", (num_out, lora.rank), transpose=True))
    return entries


def _projections(config: ModelConfig) -> list[tuple[str, str, tuple[int, int]]]:
    """Our path, transformers' name below the prefix, and (in, out) of every projection."""
    return [
        (f"layers.{index}.{path}", f"layers.{index}.{PROJECTIONS[path]}", sizes)
        for index in range(config.num_layers)
        for path, sizes in projection_sizes(config).items()
    ]


def _short(path: str) -> str:
    return path.split(".")[1]
