"""`pshare-train --dry-run`: prints shapes, tokens, memory and time of a run; writes nothing and loads no weights.

It reads config and tokenizer of the base, and all of the data as the run would. The command line calls it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import jax
from rich.console import Console

from pshare_jax.errors import PshareError
from pshare_jax.mesh import make_mesh
from pshare_jax.model.architecture import Architecture
from pshare_jax.model.layers import Build
from pshare_jax.model.sharding import check_tensor_parallel
from pshare_jax.share.model import Outline, default_dtype, read_outline
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.epochs import sample_lengths
from pshare_jax.training.data.loader import row_capacity, training_batches
from pshare_jax.training.data.prepare import SampleSet
from pshare_jax.training.guide import guide_bytes, loss_of
from pshare_jax.training.plan.memory import (
    BatchShape,
    device_bytes,
    estimate_temporaries,
    estimate_update,
    held_memory,
    step_shapes,
)
from pshare_jax.training.plan.short_models import Pair, ShortModel, extrapolate, free_memory, short_models
from pshare_jax.training.run import read_data
from pshare_jax.training.step.mesh import abstract_mesh, training_mesh
from pshare_jax.training.step.optimizer import update_rule
from pshare_jax.training.step.static import Objective, make_objective
from pshare_jax.training.trainer import num_steps

Lines = list[tuple[str, str]]
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Planned:
    """The batches of a run: `tokens` per batch without padding; `steps` is None if unknown without the data."""

    shape: BatchShape
    tokens: int | float
    steps: int | None
    lines: Lines


def dry_run(config: TrainConfig) -> None:
    """Prints the plan of a run; takes a minute or two, mainly to compile and time short models.

    Raises:
        PshareError: an error in the config, the base's config or tokenizer, or the data.
    """
    outline = read_outline(config.base)
    check_tensor_parallel(outline.config, config.mesh.tensor)
    # Virtual devices of a CPU share its cores and memory.
    available = 1 if jax.devices()[0].platform == "cpu" else len(jax.devices())
    enough = config.mesh.size <= available
    dtype = default_dtype(make_mesh([0])) if config.dtype == "auto" else config.dtype
    base = Architecture(outline.config, Build(dtype, outline.weights))
    mesh = training_mesh(config.mesh) if enough else abstract_mesh(config.mesh)
    objective = make_objective(base, config.module, mesh, dtype, config.remat, loss_of(config.objective))
    _show("model", _model(objective, config))
    planned = _planned(config, outline)
    _show("data", planned.lines)
    shapes = step_shapes(objective, update_rule(config.optimizer, 1).transform, planned.shape, config.accumulation)
    held = held_memory(shapes)
    if (second := guide_bytes(config, device_bytes(objective.base_shapes))) > 0:
        held["second model's weights"] = second
    always, num_layers = sum(held.values()), outline.config.num_layers
    temporaries = estimate_temporaries(objective, shapes, planned.shape)
    _show("memory of a device in MiB, estimated from shapes", _estimated(held, temporaries, estimate_update(shapes)))
    if not enough:
        devices = "1 is available (a CPU counts as 1)" if available == 1 else f"{available} are available"
        _show("time", [("not measured", f"the mesh has {config.mesh.size} devices, of which {devices}")])
        return
    models = short_models(objective, config, planned.shape)
    _show("memory of this device in MiB, as compiled by XLA", _compiled(models, always, num_layers))
    _show("time", _times(models, planned, config, num_layers))


# --- parts -----------------------------------------------------------------------------------------------------------


def _show(title: str, lines: Lines) -> None:
    console = Console()
    for line in (f"\n{title}", *(f"  {name:<34}{value}" for name, value in lines)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _model(objective: Objective, config: TrainConfig) -> Lines:
    model = objective.config
    sizes = f"{model.num_layers} layers of {model.hidden_size}, MLP {model.ffn_size}"
    heads = f"{model.num_heads} heads and {model.num_kv_heads} kv heads of {model.head_dim}"
    trained = _count(objective.trainable_shapes.values())
    everything = _count(objective.base.shapes.values())
    return [
        (model.family, f"{sizes}, {heads}, vocabulary {model.vocab_size}{', tied' if model.tied else ''}"),
        ("parameters", f"{everything:,}"),
        ("trained", f"{trained:,} ({config.method}, {config.module.kind})"),
        *([] if config.objective.name == "sft" else [("objective", config.objective.name)]),
    ]


def _count(shapes: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(x.size for x in shapes)


def _planned(config: TrainConfig, outline: Outline) -> Planned:
    if outline.tokenizer is None:
        return _without_tokenizer(config)
    data = read_data(config, outline.tokenizer, outline.stop_ids, outline.config)
    with training_batches(data.train, config.data, config.layout) as batches:
        epochs, num_batches = batches.epochs, batches.num_batches()
        shape = BatchShape(config.layout, config.data.batch.rows, *row_capacity(data.train, config.data, config.layout))
        per_epoch, fill = epochs.num_batches(0), epochs.fill()
    targets, tokens = _epoch_tokens(data.train, config)
    steps = num_steps(config, num_batches)
    # The last step may have fewer batches.
    read = min(steps * config.accumulation, num_batches or math.inf)
    per_batch = tokens / per_epoch
    lines = [
        ("samples", f"{len(data.train):,} for training, {len(data.evaluation):,} for evaluation"),
        *_shape_lines(shape),
        ("an epoch", f"{per_epoch:,} batches, {tokens:,.0f} tokens, {targets:,.0f} of them targets"),
        ("positions that hold tokens", f"{fill:.0%}"),
        *_run_lines(steps, read * per_batch),
    ]
    return Planned(shape, per_batch, steps, lines)


def _without_tokenizer(config: TrainConfig) -> Planned:
    rows, context_len, answer_len = config.data.batch.rows, config.data.batch.context_len, config.data.batch.answer_len
    if context_len is None or answer_len is None:
        raise PshareError(
            f"{config.base} has no tokenizer to count the data; set data.batch.context_len and data.batch.answer_len, "
            "or add its tokenizer files."
        )
    shape = BatchShape(config.layout, rows, context_len, answer_len)
    positions = rows * (context_len + (answer_len if shape.layout == "two_stream" else 0))
    lines = [("not counted", f"{config.base} has no tokenizer; assuming tokens at all positions"), *_shape_lines(shape)]
    if config.steps is not None:
        lines += _run_lines(config.steps, config.steps * config.accumulation * positions)
    return Planned(shape, positions, config.steps, lines)


def _shape_lines(shape: BatchShape) -> Lines:
    if shape.layout == "two_stream":
        size = f"{shape.rows} rows of {shape.context_len} context and {shape.answer_len} answer tokens"
    else:
        size = f"{shape.rows} rows of {shape.context_len} tokens, up to {shape.answer_len} of them targets"
    return [("a batch", size)]


def _run_lines(steps: int, tokens: int | float) -> Lines:
    return [("the run", f"{steps:,} steps, about {tokens:,.0f} tokens")]


def _epoch_tokens(samples: SampleSet, config: TrainConfig) -> tuple[float, float]:
    """Target tokens and all tokens of an epoch."""
    lengths = sample_lengths(samples, config.layout)
    read = lengths.sum(axis=1) if config.layout == "two_stream" else lengths[:, 0]
    targets = tokens = 0.0
    for members, weight in zip(samples.members, samples.weights, strict=True):
        targets += weight * float(lengths[members, 1].sum())
        tokens += weight * float(read[members].sum())
    return targets, tokens


def _estimated(held: dict[str, int], temporaries: dict[str, int], update: int) -> Lines:
    peak = sum(held.values()) + max(sum(temporaries.values()), update)
    return [
        *((name, _mib(size)) for name, size in held.items()),
        *((f"in a batch: {name}", _mib(size)) for name, size in temporaries.items() if size),
        ("in the update: the largest array", _mib(update)),
        ("peak", f"{_mib(peak)}  on a device that frees each layer's intermediates at once"),
    ]


def _compiled(models: dict[int, ShortModel], always: int, num_layers: int) -> Lines:
    in_batch, in_update = _extrapolated({number: model.temporaries() for number, model in models.items()}, num_layers)
    peak = always + max(in_batch, in_update)
    lines = [
        ("held between steps", _mib(always)),
        ("in a batch", _mib(in_batch)),
        ("in the update", _mib(in_update)),
        ("peak", f"{_mib(peak)}  {_how(models, num_layers)}"),
    ]
    resident = {number: model.process for number, model in models.items() if model.process is not None}
    if jax.devices()[0].platform != "cpu" or not resident:
        return lines
    process = extrapolate(resident, num_layers)
    return [*lines, ("the process after compilation", _mib(process)), ("peak with the process", _mib(peak + process))]


def _extrapolated(values: dict[int, Pair], num_layers: int) -> tuple[int | float, int | float]:
    """The values of all layers, for a batch and for the update."""
    in_batch = extrapolate({number: pair.accumulate for number, pair in values.items()}, num_layers)
    return in_batch, extrapolate({number: pair.apply for number, pair in values.items()}, num_layers)


def _times(models: dict[int, ShortModel], planned: Planned, config: TrainConfig, num_layers: int) -> Lines:
    needed, free = max(model.needs() for model in models.values()), free_memory()
    if needed > free:
        reason = f"{max(models)} of its layers need {needed / GIB:.1f} GiB, but only {free / GIB:.1f} GiB are free"
        return [("not measured", reason)]
    in_batch, update = _extrapolated({number: model.seconds() for number, model in models.items()}, num_layers)
    batches = config.accumulation
    step = batches * in_batch + update
    lines = [
        (
            "a step",
            f"{_seconds(step)}: {batches} x {_seconds(in_batch)} per batch and {_seconds(update)} for the update",
        ),
        ("tokens per second", f"{batches * planned.tokens / step:,.0f}"),
    ]
    if planned.steps is not None:
        lines.append(
            ("the run", f"{timedelta(seconds=round(planned.steps * step))}, without evaluations and checkpoints")
        )
    device = jax.devices()[0].device_kind
    return [*lines, ("measured", f"on {config.mesh.size} x {device}, {_how(models, num_layers)}")]


def _how(models: dict[int, ShortModel], num_layers: int) -> str:
    if len(models) == 1:
        return "the whole model, with synthetic weights"
    return f"from models with {' and '.join(map(str, models))} of {num_layers} layers, with synthetic weights"


def _mib(size: int | float) -> str:
    return f"{size / MIB:10,.1f}"


def _seconds(value: int | float) -> str:
    return f"{value:.3g} s"
