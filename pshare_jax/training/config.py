"""The train config and its checks. The command line loads and checks a `TrainConfig` before it imports JAX."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least
from pshare_jax.text.chat_style import ChatLayout, ChatStyle, parse_style, read_template
from pshare_jax.training.data.batches import Layout
from pshare_jax.training.data.config import MAX_SEED, DataConfig, check_data
from pshare_jax.training.objective_config import ObjectiveConfig, check_objective

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
_TIED = ("embedding", "embed_tokens", "head", "lm_head")

Method = Literal["prefillshare", "full_ft"]
Remat = Literal["none", "layer", "dots"]

# Keys that a resumed run may change: they do not affect a step, except that the schedule depends on the length, and rows only
# between two epochs, which the loader checks.
CHANGEABLE = (
    "steps",
    "mesh",
    "checkpoint",
    "evaluation",
    "max_bad_steps",
    "output",
    "remat",
    "tracker",
    "data.batch.rows",
    "data.epochs",
    "data.num_workers",
)


@dataclass(frozen=True)
class ModuleConfig:
    """The trainable module: `full`, all weights, or `lora`, an adapter on the base.

    LoRA adds alpha / rank * x A B to the projections `targets`, with `dropout` on its input. The module's manifest records
    `tool_format`, how it writes function calls (null: as the chat template does), and the chats' `layout`.
    Its `chat_template` is a name or a Jinja file (null: the base's). With a `text_prompt`, such as "{prompt}\\n", it reads texts.

    Training starts from `init`: a folder or hub name of a fine-tune, an adapter or an earlier module (null: the base).
    """

    kind: Literal["full", "lora"] = "lora"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    tool_format: str | dict[str, str] | None = None
    layout: ChatLayout = field(default_factory=ChatLayout)
    init: str | None = None
    chat_template: str | None = None
    text_prompt: str | None = None

    @property
    def style(self) -> ChatStyle:
        """How the module reads and writes chats."""
        template = read_template(self.chat_template, "module.chat_template")
        return parse_style(
            self.tool_format, asdict(self.layout), "module.", template=template, text_prompt=self.text_prompt
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """The learning rate rises over `warmup_steps` steps (null: the fraction `warmup_ratio` of all steps), then follows
    `schedule` to the last step. Gradients are clipped to the global norm `clip_norm` (null: no clipping).

    `adamw` keeps two moments of a weight's size, `lion` one, `adafactor` the means of rows and columns of the second and no
    first (b1, b2 and eps are not used); `moment_dtype` is that of the first moment.
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
    name: Literal["adamw", "adafactor", "lion"] = "adamw"
    moment_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class MeshConfig:
    """Devices = data * fsdp * tensor. `data` and `fsdp` split a batch's rows, `fsdp` and `tensor` the weights."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.tensor


@dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and at the end. The last `keep` are kept, and with `keep_best` also the
    checkpoint with the lowest held-out loss, which is saved as soon as it is found.
    """

    every: int = 100
    keep: int = 2
    keep_best: bool = True


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss every `every` steps (null: only at the end), if there are evaluation data."""

    every: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """A train config. `output` is the run folder.

    The run ends after `steps` steps or at the end of the data, whichever is first. A step accumulates the gradients of
    `accumulation` batches. `dtype` is the compute dtype; trainable weights and optimizer state are float32. The run
    fails after `max_bad_steps` consecutive steps whose loss or gradient is not finite.

    `remat` is what the backward pass computes again of a layer: all but its input (layer), all but the products with weights,
    which takes more memory and less time (dots), or nothing (none). `sweep` maps keys of optimizer and module to lists of
    values: each combination is a run in a folder below `output` (sweep.py).
    """

    base: str
    data: DataConfig
    output: str
    method: Method = "prefillshare"
    module: ModuleConfig = field(default_factory=ModuleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int | None = None
    accumulation: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Remat = "layer"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    max_bad_steps: int = 10
    seed: int = 0
    sweep: dict[str, list[bool | int | float | str | None]] = field(default_factory=dict)
    tracker: Literal["none", "wandb", "trackio"] = "none"

    @property
    def layout(self) -> Layout:
        """The batch layout of the method."""
        return "two_stream" if self.method == "prefillshare" else "one_stream"

    @property
    def pairs(self) -> bool:
        """Whether the data are pairs of answers."""
        return self.objective.name == "dpo"


def check_train_config(config: TrainConfig) -> None:
    """Checks all values.

    Raises:
        PshareError: a wrong value; the message has the key and the allowed values.
    """
    for key, text in (("base", config.base), ("output", config.output)):
        if not text.strip():
            raise PshareError(f"{key} must not be empty.")
    check_data(config.data)
    check_least(_least_values(config))
    if config.seed > MAX_SEED:
        raise PshareError(f"seed must be at most {MAX_SEED}, not {config.seed}.")
    if config.steps is None and config.data.epochs is None:
        raise PshareError("steps must be set when data.epochs is null, since the data never end.")
    _check_module(config.module)
    check_objective(config.objective)
    _check_pairs(config)
    _check_optimizer(config.optimizer)
    _check_evaluation(config)
    split = config.mesh.data * config.mesh.fsdp
    if config.data.batch.rows % split:
        raise PshareError(
            f"data.batch.rows must be a multiple of mesh.data * mesh.fsdp = {split}, not {config.data.batch.rows}."
        )


def changed_keys(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Dotted keys in which two configs differ and which a resumed run must not change."""
    return [key for key in _differences(asdict(config), asdict(other), "") if not _changeable(key)]


def _changeable(key: str) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in CHANGEABLE)


def _differences(ours: Any, theirs: Any, key: str) -> list[str]:
    if not (isinstance(ours, dict) and isinstance(theirs, dict)):
        return [] if ours == theirs else [key]
    below = [_differences(ours[name], theirs[name], f"{key}.{name}" if key else name) for name in ours]
    return [key for keys in below for key in keys]


def _check_module(module: ModuleConfig) -> None:
    # Reads it.
    _ = module.style
    if module.kind == "full":
        if module.dropout:
            raise PshareError("module.dropout needs LoRA; set it to 0, or module.kind to lora.")
        return
    if not 0 < module.alpha < math.inf:
        raise PshareError(f"module.alpha must be positive and finite, not {module.alpha}.")
    if not 0 <= module.dropout < 1:
        raise PshareError(f"module.dropout must be at least 0 and less than 1, not {module.dropout}.")
    if not module.targets:
        raise PshareError(f"module.targets must not be empty; use some of {', '.join(TARGETS)}.")
    for target in module.targets:
        if target in _TIED:
            raise PshareError(
                f"module.targets contains {target}, but embeddings and head get no LoRA, since they may be one "
                "tensor; remove it, or train with module.kind: full."
            )
        if target not in TARGETS:
            raise PshareError(f"module.targets contains {target!r}; allowed are {', '.join(TARGETS)}.")
    if len(set(module.targets)) < len(module.targets):
        raise PshareError("module.targets contains a projection twice; list each projection once.")


def _check_pairs(config: TrainConfig) -> None:
    sources = [*config.data.sources, *config.data.eval_sources]
    if config.pairs and any(source.shape != "preference" for source in sources):
        raise PshareError("objective.name: dpo needs records with two answers; set shape: preference in every source.")


def _check_optimizer(optimizer: OptimizerConfig) -> None:
    for name, low, value, high in (
        ("learning_rate", 0, optimizer.learning_rate, math.inf),
        ("eps", 0, optimizer.eps, math.inf),
        ("clip_norm", 0, optimizer.clip_norm, math.inf),
    ):
        if value is not None and not low < value < high:
            raise PshareError(f"optimizer.{name} must be positive and finite, not {value}.")
    for name, share in (("b1", optimizer.b1), ("b2", optimizer.b2), ("warmup_ratio", optimizer.warmup_ratio)):
        if not 0 <= share < 1:
            raise PshareError(f"optimizer.{name} must be at least 0 and less than 1, not {share}.")
    if not 0 <= optimizer.weight_decay < math.inf:
        raise PshareError(f"optimizer.weight_decay must be at least 0 and finite, not {optimizer.weight_decay}.")


def _check_evaluation(config: TrainConfig) -> None:
    has_data = config.data.eval_fraction > 0 or bool(config.data.eval_sources)
    if config.evaluation.every is not None and not has_data:
        raise PshareError("evaluation.every needs evaluation data; set data.eval_fraction or data.eval_sources.")


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
