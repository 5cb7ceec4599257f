"""The training step of models with few layers, from which the dry run extrapolates memory and time to all layers.

It compiles the step for XLA's memory (`memory_analysis`) and times it on synthetic weights. Both are linear in the
number of layers, so two short models suffice; layers of other kinds (sliding windows) are counted like the first
layers.
"""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pshare_jax.host_memory import free_host_memory
from pshare_jax.model.architecture import Architecture
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.plan.memory import BatchShape, StepShapes, held_memory, step_shapes
from pshare_jax.training.step.guide import Guide, guide_batch, guide_program
from pshare_jax.training.step.mesh import batch_sharding
from pshare_jax.training.step.optimizer import update_rule
from pshare_jax.training.step.static import Objective
from pshare_jax.training.step.steps import Sums, TrainState, train_steps

NUM_LAYERS = 2, 6
"""Layers of the two models; a model with at most the second number is used as a whole."""
RUNS, LEAST_RUNS, SECONDS = 9, 3, 30.0
"""Timed steps after two warm-up steps: at most RUNS; at least LEAST_RUNS, then until SECONDS have passed."""


@dataclass(frozen=True)
class Pair:
    """A number for each of the two programs: gradients of a batch, and the update."""

    accumulate: int | float
    apply: int | float


class ShortModel:
    """The compiled steps of the first `num_layers` layers of a run's model."""

    def __init__(self, objective: Objective, num_layers: int, config: TrainConfig, batch: BatchShape) -> None:
        """Compiles, and allocates nothing on the device."""
        objective = replace(
            objective,
            base=_first_layers(objective.base, num_layers),
            architecture=_first_layers(objective.architecture, num_layers),
        )
        self._batch, self._vocab_size, self._mesh = batch, objective.config.vocab_size, objective.mesh
        rule = update_rule(config.optimizer, 1)
        steps: Any = train_steps(objective, rule, config.seed)
        self._shapes: StepShapes = step_shapes(objective, rule.transform, batch, config.accumulation)
        shapes = self._shapes
        arguments = (
            None if shapes.single_batch else shapes.sums,
            shapes.state.trainable,
            shapes.frozen,
            shapes.base,
            shapes.batch,
            np.int32(0),
        )
        # A second model has the base's architecture.
        self._guide = replace(objective, architecture=objective.base) if objective.loss.guide_kv else None
        self._accumulate: Any = steps.accumulate.lower(*arguments).compile()
        self._apply: Any = steps.apply.lower(shapes.state, shapes.sums).compile()
        self.process = resident_memory()
        """Bytes of the process after compilation."""

    def temporaries(self) -> Pair:
        """Bytes on one device that the compiled steps allocate in addition to their arguments."""
        programs = [self._accumulate]
        if self._guide is not None:
            # Its program ends before the module's begins.
            arrays, split = guide_batch(self._batch.arrays(self._vocab_size), self._guide), batch_sharding(self._mesh)
            inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), arrays)
            program, weights = cast(Any, guide_program(self._guide)), self._guide.base_shapes
            programs.append(program.lower(weights, weights, inputs).compile())
        return Pair(max(map(_temporaries, programs)), _temporaries(self._apply))

    def needs(self) -> int:
        """Bytes on one device to run the steps."""
        temporaries = self.temporaries()
        return sum(held_memory(self._shapes).values()) + int(max(temporaries.accumulate, temporaries.apply))

    def seconds(self) -> Pair:
        """Median seconds of the steps."""
        timed, spent = [], 0.0
        for number, seconds in enumerate(self._timed()):
            if number < 2:
                continue
            timed.append(seconds)
            spent += seconds.accumulate + seconds.apply
            if len(timed) >= RUNS or (len(timed) >= LEAST_RUNS and spent > SECONDS):
                break
        return Pair(median(pair.accumulate for pair in timed), median(pair.apply for pair in timed))

    def _timed(self) -> Iterator[Pair]:
        shapes = self._shapes
        base = {path: _synthetic(x) for path, x in shapes.base.items()}
        # Without a base stream, the module's frozen weights are the only whole model.
        frozen = (base or {path: _synthetic(x) for path, x in shapes.frozen.items()}) if shapes.frozen else {}
        state = TrainState._make(
            [jax.tree.map(_synthetic, shapes.state.trainable), *jax.tree.map(_zeros, shapes.state[1:])]
        )
        arrays = self._batch.arrays(self._vocab_size)
        guide = None
        if self._guide is not None:
            weights = base or frozen or {path: _synthetic(x) for path, x in self._guide.base_shapes.items()}
            guide = Guide(self._guide, weights, weights)
        batch = jax.device_put(arrays, batch_sharding(self._mesh))
        while True:
            before: Sums | None = None if shapes.single_batch else jax.tree.map(_zeros, shapes.sums)
            jax.block_until_ready(before)
            began = time.perf_counter()
            if guide is not None:
                batch = guide(arrays)
            sums = self._accumulate(before, state.trainable, frozen, base, batch, np.int32(0))
            jax.block_until_ready(sums)
            between = time.perf_counter()
            state, result = self._apply(state, sums)
            jax.block_until_ready((state, result))
            yield Pair(between - began, time.perf_counter() - between)


def short_models(objective: Objective, config: TrainConfig, batch: BatchShape) -> dict[int, ShortModel]:
    """Number of layers -> model, for one or two models."""
    all_layers = objective.config.num_layers
    numbers = NUM_LAYERS if all_layers > NUM_LAYERS[1] else (all_layers,)
    return {number: ShortModel(objective, number, config, batch) for number in numbers}


def extrapolate(values: Mapping[int, int | float], num_layers: int) -> int | float:
    """The value for `num_layers` layers on the line through `values`, which maps numbers of layers to values."""
    (first, low), (last, high) = min(values.items()), max(values.items())
    return low if first == last else low + (num_layers - first) / (last - first) * (high - low)


def free_memory() -> int:
    """Free bytes of the first device; for a CPU those of the machine."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_limit"] - stats["bytes_in_use"] if stats else free_host_memory()


def resident_memory() -> int | None:
    """Resident bytes of this process; None without /proc."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


# --- parts -----------------------------------------------------------------------------------------------------------


def _first_layers(architecture: Architecture, count: int) -> Architecture:
    config = architecture.config
    return replace(architecture, config=replace(config, layers=config.layers[:count]))


def _temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype, device=x.sharding)


def _synthetic(x: jax.ShapeDtypeStruct) -> jax.Array:
    """Small values of both signs without zeros: arithmetic with zeros or denormals may have other timings."""

    def make() -> jax.Array:
        index = jax.lax.iota(jnp.int32, x.size).reshape(x.shape)
        return ((index % 1021 - 510.5) / 25_000).astype(x.dtype)

    return jax.jit(make, out_shardings=x.sharding)()
