"""The objective section of a train config and its checks."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least

_KEYS = {
    "sft": (),
    "distillation": ("teacher", "temperature", "top_k", "alpha"),
    "dpo": ("beta",),
}
"""The keys of each objective beside its name."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What training minimises. `sft`: the answers' negative log-likelihood.

    `distillation`: alpha * temperature^2 * KL(teacher || module) + (1 - alpha) * sft. `teacher` is the base or a fine-tune of it
    (a folder or hub name: full weights, an adapter, the module of a full_ft run), and reads everything itself. With `top_k` the
    divergence is over the teacher's best tokens and all others together (null: over all tokens).

    `dpo`: of a record of shape preference, prefer the chosen answer to the rejected answer; `beta` pulls towards the initial
    module.
    """

    name: Literal["sft", "distillation", "dpo"] = "sft"
    teacher: str | None = None
    temperature: float = 1.0
    top_k: int | None = None
    alpha: float = 1.0
    beta: float = 0.1

    def described(self) -> dict[str, Any]:
        """The name and the keys that the objective has."""
        return {name: value for name, value in asdict(self).items() if name in ("name", *_KEYS[self.name])}


def check_objective(config: ObjectiveConfig) -> None:
    """Checks the values.

    Raises:
        PshareError: a wrong value; the message has the key and the allowed values.
    """
    for field in fields(config):
        owner = next((name for name, keys in _KEYS.items() if field.name in keys), config.name)
        if owner != config.name and getattr(config, field.name) != field.default:
            raise PshareError(f"objective.{field.name} belongs to {owner}; remove it, or set objective.name: {owner}.")
    if config.name == "distillation" and not (config.teacher or "").strip():
        raise PshareError("objective.name: distillation needs objective.teacher: a folder or hub name of a fine-tune.")
    check_least([("objective.top_k", config.top_k, 1)])
    for name, value in (("temperature", config.temperature), ("beta", config.beta)):
        if not 0 < value < math.inf:
            raise PshareError(f"objective.{name} must be positive and finite, not {value}.")
    if not 0 < config.alpha <= 1:
        raise PshareError(f"objective.alpha must be above 0 and at most 1, not {config.alpha}.")
