"""A training step: losses, gradients and AdamW, on random samples; prefillshare against ordinary fine-tuning."""

from typing import Any, get_args

import numpy as np
import optax

from benchmarks.device import counts
from benchmarks.device.check import Cell, Check
from benchmarks.device.models import random_model
from benchmarks.device.sizes import RANK, TARGETS, Kind, TrainingSizes
from benchmarks.device.timing import median_seconds
from pshare_jax.share.boundary import base_len, next_position
from pshare_jax.share.model import Model
from pshare_jax.training.config import Method, ModuleConfig
from pshare_jax.training.data.batches import one_stream, two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step.objective import init_trainable, trainable_module
from pshare_jax.training.step.optimizer import UpdateRule
from pshare_jax.training.step.steps import StepResult, train_steps

LEARNING_RATE = 1e-4


class Trainer:
    """One method on random samples; each `step` updates the module."""

    def __init__(
        self, base: Model, method: Method, kind: Kind, sizes: TrainingSizes, dtype: str, rate: float = LEARNING_RATE
    ):
        module = trainable_module(base, method, ModuleConfig(kind=kind, rank=RANK, targets=TARGETS), dtype)
        rows = [[sample] for sample in _samples(sizes, base.config.vocab_size)]
        if module.layout == "two_stream":
            self._batch: Any = two_stream(rows, base_len(sizes.prompt), sizes.answer)
        else:
            self._batch = one_stream(rows, next_position(sizes.prompt + sizes.answer), sizes.answer)
        rule = UpdateRule(optax.adamw(rate), optax.constant_schedule(rate), None)
        self._steps = train_steps(module.objective, rule, 0)
        self._state = self._steps.init(init_trainable(module, 0))
        # As in a training run, the base is freed if no step reads it.
        self._fixed = module.frozen, module.base_params if module.layout == "two_stream" else {}

    def step(self) -> StepResult:
        """One step; the loss before it, and the norm of its gradient."""
        sums = self._steps.accumulate(None, self._state.trainable, *self._fixed, self._batch, np.int32(0))
        self._state, result = self._steps.apply(self._state, sums)
        return result


def run(check: Check) -> None:
    """Both methods; all weights, or an adapter where the device has no room for the optimizer's state of all."""
    weights = counts.all_weights(check.config)
    # Masters, gradients and two moments in float32, the base twice while it is stacked; and activations.
    kind: Kind = "full" if check.fits(weights * (16 + 3 * check.item) + 4 * 2**30) else "lora"
    for method in get_args(Method):
        check.measure(f"{method}, {kind}", lambda method=method: _one(check, method, kind))


def _one(check: Check, method: Method, kind: Kind) -> Cell:
    sizes = check.sizes.training
    trainer = Trainer(random_model(check.config, check.mesh, check.dtype), method, kind, sizes, check.dtype)
    seconds = median_seconds(trainer.step, check.sizes.runs)
    flops = counts.training(
        check.config,
        sizes.rows,
        sizes.prompt,
        sizes.answer,
        two_streams=method == "prefillshare",
        full=kind == "full",
    )
    mfu = None if check.peaks.flops is None else flops / seconds / check.peaks.flops
    tokens = sizes.rows * (sizes.prompt + sizes.answer)
    return check.timed(seconds, counts.Work(flops, 0.0), tokens_s=tokens / seconds, mfu=mfu)


def _samples(sizes: TrainingSizes, vocab_size: int) -> list[Sample]:
    ids = np.random.default_rng(0).integers(0, vocab_size, (sizes.rows, sizes.prompt + sizes.answer))
    return [Sample(tuple(row), ((sizes.prompt, len(row)),), "random", 0) for row in ids.tolist()]
