"""The second model of an objective, which reads each batch first: distillation's teacher, or DPO's initial module.

It is a program of its own, so that its temporaries are gone when the module's step begins; what it leaves is small, a few
numbers or a hidden state for each target. The trainer calls a `Guide` for every batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from pshare_jax.model.architecture import Params
from pshare_jax.training.data.batches import TwoStreamBatch, as_one_stream
from pshare_jax.training.step.losses import Batch, Guided
from pshare_jax.training.step.mesh import batch_sharding, step_compiler_options
from pshare_jax.training.step.objective import head_of
from pshare_jax.training.step.static import Objective
from pshare_jax.training.step.streams import hidden_states


@dataclass(frozen=True)
class Guide:
    """The second model: its `objective`, with the same loss as the module's, and parameters; `base_params` compute the base's KV
    if it reads that.
    """

    objective: Objective
    params: Params
    base_params: Params

    @cached_property
    def program(self) -> Callable[[Params, Params, Batch], Any]:
        """The jitted `guide_signal`."""
        return guide_program(self.objective)

    def __call__(self, batch: Batch) -> Guided:
        """The host's `batch` on the mesh, read."""
        split, seen = batch_sharding(self.objective.mesh), guide_batch(batch, self.objective)
        placed = jax.device_put(batch, split)
        signal = self.program(self.params, self.base_params, placed if seen is batch else jax.device_put(seen, split))
        return Guided(placed, signal, head_of(self.objective, self.params).weight)


def guide_batch(batch: Batch, objective: Objective) -> Batch:
    """The host's batch as the second model reads it."""
    own = objective.loss.guide_kv == "own"
    return as_one_stream(batch) if own and isinstance(batch, TwoStreamBatch) else batch


def guide_program(objective: Objective) -> Callable[[Params, Params, Batch], Any]:
    """(parameters, the base's, the batch as `guide_batch` gives it) -> the loss's signal, split by rows."""

    def signal(params: Params, base_params: Params, batch: Batch) -> Any:
        hidden = hidden_states(objective, params, base_params, batch, None)
        return objective.loss.signal(head_of(objective, params), hidden, batch)

    options = step_compiler_options(objective.mesh)
    return jax.jit(signal, out_shardings=batch_sharding(objective.mesh), compiler_options=options)
