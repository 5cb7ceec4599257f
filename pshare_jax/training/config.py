"""What a train config may say. The command line loads a `TrainConfig` and checks it before anything else is loaded.

Imports no jax.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least
from pshare_jax.training.data.batches import Layout
from pshare_jax.training.data.config import MAX_SEED, DataConfig, check_data

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_TIED = ("embedding", "embed_tokens", "head", "lm_head")

Method = Literal["prefillshare", "full_ft"]

# What a resumed run may say otherwise: none of it changes what a step computes, save that a longer run has another schedule.
CHANGEABLE = (
    "steps",
    "mesh",
    "checkpoint",
    "evaluation",
    "max_bad_steps",
    "output",
    "data.epochs",
    "data.num_workers",
)


@dataclass(frozen=True)
class ModuleConfig:
    """What is trained: `full`, all weights of the decode module, or `lora`, an adapter on the base.

    A LoRA adapter adds alpha / rank * x A B to the projections `targets`; `dropout` is that of its input. A full module
    does not use these keys.
    """

    kind: Literal["full", "lora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. The learning rate rises over `warmup_steps` steps, or else the share `warmup_ratio` of all steps, then follows
    `schedule` to the last step. Gradients are scaled down to the global norm `clip_norm` (null: never).
    """

    learning_rate: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0


@dataclass(frozen=True)
class MeshConfig:
    """Devices = data * fsdp * tensor. `data` and `fsdp` split a batch's rows, `fsdp` and `tensor` the
    weights, where they divide."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Devices."""
        return self.data * self.fsdp * self.tensor


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps, and at the end; the last `keep` stay, and with `keep_best` the one with the lowest
    held-out loss, too (each new best is saved when it is found).
    """

    every: int = 100
    keep: int = 2
    keep_best: bool = True


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss every `every` steps (null: never in between), and at the end, where there are evaluation data."""

    every: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A whole train config. `output` is the run folder.

    The run ends after `steps` steps or when the data end, whichever is first. A step sums the gradients of `accumulation`
    batches. `dtype` is what is computed in; trained weights and the optimizer's state are float32. After `max_bad_steps`
    steps in a row with a loss or gradient that is not finite the run ends.
    """

    base: str
    data: DataConfig
    output: str
    method: Method = "prefillshare"
    module: ModuleConfig = field(default_factory=ModuleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int | None = None
    accumulation: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    max_bad_steps: int = 10
    seed: int = 0

    @property
    def layout(self) -> Layout:
        """The batches that the method reads."""
        return "two_stream" if self.method == "prefillshare" else "one_stream"


def check_train_config(config: TrainConfig) -> None:
    """Checks all values.

    Raises:
        PshareError: naming the key and the way out.
    """
    for key, text in (("base", config.base), ("output", config.output)):
        if not text.strip():
            raise PshareError(f"{key} is empty; give it a value.")
    check_data(config.data)
    check_least(_least_values(config))
    if config.seed > MAX_SEED:
        raise PshareError(f"seed must be at most {MAX_SEED}, not {config.seed}.")
    if config.steps is None and config.data.epochs is None:
        raise PshareError("With data.epochs: null the data never end, so steps must say when the run does.")
    _check_module(config.module)
    _check_optimizer(config.optimizer)
    _check_evaluation(config)
    split = config.mesh.data * config.mesh.fsdp
    if config.data.batch.rows % split:
        raise PshareError(
            f"data.batch.rows is {config.data.batch.rows}, which mesh.data * mesh.fsdp = {split} devices cannot share; "
            f"make it a multiple of {split}."
        )


def changed_keys(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Dotted keys, of those that a resumed run must not change, in which two configs differ."""
    return [key for key in _differences(asdict(config), asdict(other), "") if not _changeable(key)]


def _changeable(key: str) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in CHANGEABLE)


def _differences(ours: Any, theirs: Any, key: str) -> list[str]:
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [key]
    below = [_differences(ours[name], theirs[name], f"{key}.{name}" if key else name) for name in ours]
    return [one for part in below for one in part]


def _check_module(module: ModuleConfig) -> None:
    if module.kind == "full":
        if module.dropout:
            raise PshareError("module.dropout is LoRA's; set it to 0, or module.kind to lora.")
        return
    if not 0 < module.alpha < math.inf:
        raise PshareError(f"module.alpha must be more than 0 and finite, not {module.alpha}.")
    if not 0 <= module.dropout < 1:
        raise PshareError(f"module.dropout must be at least 0 and less than 1, not {module.dropout}.")
    if not module.targets:
        raise PshareError(f"module.targets is empty; name some of {', '.join(TARGETS)}.")
    for target in module.targets:
        if target in _TIED:
            raise PshareError(
                f"module.targets has {target}: embeddings and head get no LoRA, since one tensor may be both; "
                "leave it out, or train with module.kind: full."
            )
        if target not in TARGETS:
            raise PshareError(f"module.targets has {target!r}; known are {', '.join(TARGETS)}.")
    if len(set(module.targets)) < len(module.targets):
        raise PshareError("module.targets names a projection twice.")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    for name, low, value, high in (
        ("learning_rate", 0, optimizer.learning_rate, math.inf),
        ("eps", 0, optimizer.eps, math.inf),
        ("clip_norm", 0, optimizer.clip_norm, math.inf),
    ):
        if value is not None and not low < value < high:
            raise PshareError(f"optimizer.{name} must be more than 0 and finite, not {value}.")
    for name, share in (("b1", optimizer.b1), ("b2", optimizer.b2), ("warmup_ratio", optimizer.warmup_ratio)):
        if not 0 <= share < 1:
            raise PshareError(f"optimizer.{name} must be at least 0 and less than 1, not {share}.")
    if not 0 <= optimizer.weight_decay < math.inf:
        raise PshareError(f"optimizer.weight_decay must be at least 0 and finite, not {optimizer.weight_decay}.")


def _check_evaluation(config: TrainConfig) -> None:
    has_data = config.data.eval_fraction > 0 or bool(config.data.eval_sources)
    if config.evaluation.every is not None and not has_data:
        raise PshareError(
            "evaluation.every is set, but there are no evaluation data; set data.eval_fraction or data.eval_sources."
        )


def _least_values(config: TrainConfig) -> list[tuple[str, int | None, int]]:
    return [
        ("module.rank", config.module.rank, 1),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps, 0),
        ("steps", config.steps, 1),
        ("accumulation", config.accumulation, 1),
        ("mesh.data", config.mesh.data, 1),
        ("mesh.fsdp", config.mesh.fsdp, 1),
        ("mesh.tensor", config.mesh.tensor, 1),
        ("checkpoint.every", config.checkpoint.every, 1),
        ("checkpoint.keep", config.checkpoint.keep, 1),
        ("evaluation.every", config.evaluation.every, 1),
        ("max_bad_steps", config.max_bad_steps, 1),
        ("seed", config.seed, 0),
    ]
