"""adapter_config.json of a LoRA adapter in PEFT's format: which modules it changes, their ranks and scales.

`lora` reads tensors by it, `decode_module` asks for the invocation. An option that changes the output in a way that one LoRA
on all layers cannot express is an error that names the option.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pshare_jax.errors import PshareError

CONFIG_FILE = "adapter_config.json"
INVOCATION = "alora_invocation_tokens"
USED = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        INVOCATION,
    }
)
# PEFT options that do not change a trained adapter's output, or do so only with another option that is refused.
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
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


@dataclass(frozen=True)
class AdapterSettings:
    """The checked options of one adapter. Modules are named as in transformers: "model.layers.0.self_attn.q_proj"."""

    path: Path
    options: Mapping[str, Any]

    def rank(self, module: str) -> int:
        """The rank of a module's A and B."""
        return self._of_module("rank_pattern", module, self.options["r"])

    def scale(self, module: str) -> float:
        """The factor on B A x: alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA."""
        alpha = self._of_module("alpha_pattern", module, self.options["lora_alpha"])
        return alpha / self.rank(module) ** (0.5 if self.options.get("use_rslora") else 1.0)

    @property
    def invocation(self) -> tuple[int, ...]:
        """The token sequence that activates the adapter; empty if it always acts."""
        return tuple(self.options.get(INVOCATION) or ())

    def adapts(self, module: str) -> bool | None:
        """Whether the options name a projection of the decoder; None if they leave it to PEFT's defaults."""
        wanted, excluded = self.options.get("target_modules"), self.options.get("exclude_modules")
        if excluded and self._named(module, excluded):
            return False
        if not wanted:
            return None
        if isinstance(wanted, str):
            return wanted.lower() == "all-linear" or self._named(module, wanted)
        return self._named(module, wanted) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        layers = self.options.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        for pattern in _listed(self.options.get("layers_pattern") or r"[^.]*"):
            if match := self._match(rf"(?:.*?\.)??{pattern}\.(\d+)\.", module, whole=False):
                return int(match[match.lastindex or 1]) in ([layers] if isinstance(layers, int) else layers)
        return False

    def _named(self, module: str, names: str | Iterable[str]) -> bool:
        """Whether a regular expression, or the end of a listed name, fits."""
        if isinstance(names, str):
            return self._match(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _of_module(self, option: str, module: str, default: Any) -> Any:
        patterns = self.options.get(option) or {}
        return next((patterns[key] for key in patterns if self._match(rf"(?:.*\.)?(?:{key})", module)), default)

    def _match(self, pattern: str, text: str, whole: bool = True) -> re.Match[str] | None:
        try:
            return (re.fullmatch if whole else re.match)(pattern, text)
        except re.error as error:
            raise PshareError(f"{self.path} has {pattern!r}, which is not a regular expression: {error}.") from error


def read_settings(folder: Path) -> AdapterSettings:
    """The options of the adapter in `folder`, checked.

    Raises:
        PshareError: the file cannot be read, an option is not supported, or a value is wrong.
    """
    path, options = folder / CONFIG_FILE, _read(folder / CONFIG_FILE)
    for name, value in options.items():
        # Strict: an option of a newer PEFT is refused until it is known to be harmless.
        if value not in (None, False, [], {}) and name not in USED | HARMLESS and value not in OFF.get(name, ()):
            raise PshareError(f"{path} has {name}: {value!r}, which is not supported; train the adapter without it.")
    for name, (allowed, what) in _CHECKS.items():
        if not allowed(options.get(name)):
            raise PshareError(f"{path}: {name} must be {what}, not {options.get(name)!r}.")
    if isinstance(options.get("target_modules"), str) and options.get("layers_to_transform") is not None:
        raise PshareError(f"{path}: layers_to_transform needs target_modules as a list, as in PEFT.")
    return AdapterSettings(path, options)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter in PEFT's format."""
    return (folder / CONFIG_FILE).is_file()


def is_activated(folder: Path) -> bool:
    """Whether the folder holds an activated LoRA, which leaves the context to the base."""
    return is_adapter(folder) and bool(_read(folder / CONFIG_FILE).get(INVOCATION))


def _read(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PshareError(f"{path} cannot be read: {error}.") from error
    if not isinstance(options, dict):
        raise PshareError(f"{path} must contain a JSON object.")
    return options


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_number(value: Any, kinds: Any = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 < value < math.inf


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _are_texts(value: Any) -> bool:
    return value is None or all(isinstance(one, str) for one in _listed(value))


def _are_indices(value: Any) -> bool:
    return value is None or all(_is_count(one, 0) for one in _listed(value))


def _are_ids(value: Any) -> bool:
    return value is None or (isinstance(value, list) and _are_indices(value))


def _is_pattern(of_number: Any) -> Any:
    return lambda value: value is None or (isinstance(value, dict) and all(map(of_number, value.values())))


_NAMES = "a name, a list of names or null"
_CHECKS: Mapping[str, tuple[Any, str]] = {
    "r": (_is_count, "a positive number"),
    "lora_alpha": (_is_number, "a positive number"),
    "rank_pattern": (_is_pattern(_is_count), "an object of positive whole numbers"),
    "alpha_pattern": (_is_pattern(_is_number), "an object of positive numbers"),
    "target_modules": (_are_texts, _NAMES),
    "exclude_modules": (_are_texts, _NAMES),
    "layers_pattern": (_are_texts, _NAMES),
    "layers_to_transform": (_are_indices, "a layer's index, a list of indices or null"),
    INVOCATION: (_are_ids, "a list of token ids"),
}
