"""How a step changes the trainable parameters: clipping, the optimizer and the schedule of its learning rate."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pshare_jax.model.architecture import Params
from pshare_jax.model.layer_stack import is_stack
from pshare_jax.training.config import OptimizerConfig


class UpdateRule(NamedTuple):
    """optax's transformation of the clipped mean gradient, its learning rate, and the global norm to clip to, if any."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    clip_norm: float | None

    def clip_factor(self, norm: Float[Array, ""]) -> Float[Array, ""]:
        """What a gradient of this norm is multiplied by. One factor for all arrays, which XLA multiplies where it reads the
        gradients; optax's own clipping makes a copy of them.
        """
        if self.clip_norm is None:
            return jnp.float32(1)
        return jnp.where(norm < self.clip_norm, 1, self.clip_norm / norm)


def update_rule(config: OptimizerConfig, num_steps: int) -> UpdateRule:
    """The rule for a run of `num_steps` steps; gradients are means over a step's target tokens."""
    schedule = make_schedule(config, num_steps)
    return UpdateRule(_transform(config, schedule), schedule, config.clip_norm)


def _transform(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    decay = {"weight_decay": config.weight_decay, "mask": decayed}
    if config.name == "adamw":
        moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps, "mu_dtype": config.moment_dtype}
        return optax.adamw(schedule, **moments, **decay)
    if config.name == "lion":
        return optax.lion(schedule, b1=config.b1, b2=config.b2, mu_dtype=config.moment_dtype, **decay)
    # Not optax.adafactor, whose weight decay ignores the learning rate.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.stateless(_clipped_by_layer),
        optax.add_decayed_weights(**decay),
        optax.scale_by_learning_rate(schedule),
    )


def _clipped_by_layer(updates: Any, _: Any) -> Params:
    """Adafactor's clipping of updates to a root mean square of 1 (arXiv 1804.04235, alg. 4), by layer in stacks."""
    return {path: _clipped(path, update) for path, update in updates.items()}


def _clipped(path: str, update: Float[Array, "..."]) -> Float[Array, "..."]:
    axes = tuple(range(1 if is_stack(path) else 0, update.ndim))
    return update / jnp.maximum(1, jnp.sqrt(jnp.mean(jnp.square(update), axes, keepdims=True)))


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate of a step, given the number of steps applied before it.

    Step k (from 0) of w warm-up steps has (k + 1) / (w + 1) of the peak, so that the first step is not 0; the step
    after warm-up has the peak. Cosine and linear decay reach 0 one step after the last.
    """
    warmup = min(warmup_steps(config, num_steps), num_steps)
    peak, rest = config.learning_rate, max(1, num_steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(1, warmup))
    return optax.join_schedules([rise, after], [warmup])


def warmup_steps(config: OptimizerConfig, num_steps: int) -> int:
    """Steps over which the learning rate rises."""
    return round(config.warmup_ratio * num_steps) if config.warmup_steps is None else config.warmup_steps


def decayed(params: Params) -> dict[str, bool]:
    """Which parameters have weight decay: all matrices, including LoRA's A and B, but no norm and no bias.

    Decay of B pulls the module towards the base; torch's AdamW, the usual optimizer with PEFT, decays both as well.
    """
    return {path: not path.endswith(("norm.weight", ".bias")) for path in params}
