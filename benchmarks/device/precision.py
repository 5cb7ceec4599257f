"""Bfloat16 training steps on the device against float32 on the CPU: the same tiny model, samples and updates."""

from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.device.check import Cell, Check
from benchmarks.device.models import random_model
from benchmarks.device.sizes import Kind, TrainingSizes, shape
from benchmarks.device.training import Trainer
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.share.model import Model
from pshare_jax.training.config import Method

STEPS = 3
RATE = 3e-3
"""Learning rate: weights in bfloat16 do not notice much smaller updates."""
SAMPLES = TrainingSizes(rows=4, prompt=48, answer=16)
TOLERANCE, NORM_TOLERANCE = 2e-2, 5e-2
"""The largest differences that are allowed of a loss, and of the norm of the first gradient, as parts of them."""


def run(check: Check) -> None:
    """Each method with all weights and with an adapter."""
    for method, kind in check.sizes.precision:
        check.measure(f"{method}, {kind}", lambda method=method, kind=kind: _one(check, method, kind))


def _one(check: Check, method: Method, kind: Kind) -> Cell:
    model = random_model(shape("tiny"), check.mesh, "bfloat16")
    losses, norm = _trained(model, method, kind, "bfloat16")
    expected, expected_norm = _trained(_on_cpu(model), method, kind, "float32")
    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))
    norms = abs(norm / expected_norm - 1)
    if not (worst <= TOLERANCE and norms <= NORM_TOLERANCE):
        raise AssertionError(
            f"losses {losses} and norm {norm} on the device, {expected} and {expected_norm} on the CPU"
        )
    return {"loss": losses[-1], "cpu_loss": expected[-1], "worst_relative": worst, "norm_relative": norms}


def _trained(model: Model, method: Method, kind: Kind, dtype: str) -> tuple[list[float], float]:
    """The losses of all steps, and the norm of the first gradient."""
    trainer = Trainer(model, method, kind, SAMPLES, dtype, RATE)
    results = [trainer.step() for _ in range(STEPS)]
    return [float(result.loss) for result in results], float(results[0].grad_norm)


def _on_cpu(model: Model) -> Model:
    """The same weights in float32 on a CPU device."""
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), model.mesh.axis_names)
    params = {
        path: jax.device_put(np.asarray(array).astype(np.float32), parameter_sharding(path, model.config, mesh))
        for path, array in model.params.items()
    }
    return replace(model, architecture=model.architecture.with_dtype("float32"), params=params, mesh=mesh)
