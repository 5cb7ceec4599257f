"""LoRA adapters in PEFT's format: adapter_config.json, adapter_model.safetensors <-> our `lora_a`, `lora_b` parameters.

`decode_module` is the only caller. A PEFT option that changes the output in a way that `Projection` does not compute is
an error that names the option.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Params, is_lora
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.layers import LoraConfig
from pshare_jax.share.model import Model
from pshare_jax.weights.load import device_put_tensor
from pshare_jax.weights.names import PROJECTIONS, Entry, projection_sizes
from pshare_jax.weights.safetensors import save_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model."
USED = frozenset({"r", "lora_alpha", "use_rslora", "target_modules"})
# PEFT options that do not change a trained adapter's output, or do so only with another option that is refused.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Options with a value that means "off"; only these initialisations leave the base's weights unchanged.
OFF: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def read_adapter(folder: Path, base: Model) -> tuple[LoraConfig, Params]:
    """The adapter's shape, and its A and B on the base's mesh; one error lists all faults of the tensors."""
    settings = _read_settings(folder)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise PshareError(f"{folder / WEIGHTS_FILE} cannot be read: {error}.") from error
    rank = settings["r"]
    lora = LoraConfig(rank, _scale(settings), _targets(tensors, settings, folder))
    params, faults = {}, []
    for entry in adapter_entries(base.config, lora):
        values = tensors.pop(entry.name, None)
        if values is None:
            faults.append(f"{entry.name} is missing")
        elif values.shape != entry.shape:
            faults.append(f"{entry.name} has shape {list(values.shape)} instead of {list(entry.shape)}")
        else:
            params[entry.path] = device_put_tensor(values, entry, base.config, base.mesh, base.architecture.dtype)
    faults += [f"{name} belongs to no projection" for name in tensors]
    if faults:
        raise PshareError(f"{folder / WEIGHTS_FILE} does not fit the base: {'; '.join(faults[:12])}.")
    return lora, params


def write_adapter(folder: Path, lora: LoraConfig, params: Params, config: ModelConfig) -> None:
    """Write A and B of all targets in PEFT's format; alpha is stored as scale times rank."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.scale * lora.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
        "target_modules": sorted(
            PROJECTIONS[path].split(".")[1] for path in PROJECTIONS if _short(path) in lora.targets
        ),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {
        entry.name: np.ascontiguousarray(np.asarray(params[entry.path]).T) for entry in adapter_entries(config, lora)
    }
    assert len(tensors) == sum(map(is_lora, params))
    save_tensors(folder / WEIGHTS_FILE, tensors)


def adapter_entries(config: ModelConfig, lora: LoraConfig) -> list[Entry]:
    """All A and B of an adapter: our path, PEFT's tensor name, shape in files (A `[rank, in]`, B `[out, rank]`)."""
    entries = []
    for index in range(config.num_layers):
        for path, (num_in, num_out) in projection_sizes(config).items():
            if _short(path) not in lora.targets:
                continue
            ours, theirs = f"layers.{index}.{path}", f"{PREFIX}layers.{index}.{PROJECTIONS[path]}"
            entries.append(Entry(f"{ours}.lora_a", f"{theirs}.lora_A.weight", (lora.rank, num_in), transpose=True))
            entries.append(Entry(f"{ours}.lora_b", f"{theirs}.lora_B.weight", (num_out, lora.rank), transpose=True))
    return entries


def _short(path: str) -> str:
    return path.split(".")[1]


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PshareError(f"{path} cannot be read: {error}.") from error
    if not isinstance(settings, dict):
        raise PshareError(f"{path} must contain a JSON object.")
    for name, value in settings.items():
        # Strict: an option of a newer PEFT is refused until it is known to be harmless.
        if value not in (None, False, [], {}) and name not in USED | HARMLESS and value not in OFF.get(name, ()):
            raise PshareError(f"{path} has {name}: {value!r}, which is not supported; train the adapter without it.")
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = settings.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
            raise PshareError(f"{path}: {name} must be a positive number, not {value!r}.")
    return settings


def _scale(settings: Mapping[str, Any]) -> float:
    # PEFT: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA.
    return settings["lora_alpha"] / settings["r"] ** (0.5 if settings.get("use_rslora") else 1.0)


def _targets(tensors: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    # The union of the settings' names and the tensors' names: the settings may hold a pattern instead of names.
    listed = settings.get("target_modules")
    names = {str(name).split(".")[-1] for name in listed} if isinstance(listed, list) else set()
    targets = tuple(
        _short(path)
        for path, name in PROJECTIONS.items()
        if name.split(".")[1] in names or any(f".{name}.lora_" in tensor for tensor in tensors)
    )
    if not targets:
        raise PshareError(f"{folder / WEIGHTS_FILE} has no LoRA tensors for {', '.join(PROJECTIONS.values())}.")
    return targets
