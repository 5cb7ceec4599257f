"""The optimizer: clipping, AdamW and a schedule, over the trained parameters only. Pure functions for the training step."""

import optax

from pshare_jax.model.architecture import Params
from pshare_jax.training.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """optax's chain for a run of `num_steps` steps; gradients are means over a step's target tokens."""
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(
        *clip,
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The learning rate of a step, by the number of steps applied before it.

    Step k of w warm-up steps (from 0) has (k + 1) / (w + 1) of the peak, so the first one learns something; the first after
    them has the peak. The cosine or line would be 0 one step after the last.
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
    """Which parameters weight decay pulls to zero: all matrices, A and B of LoRA too, but no norm and no bias.

    A decayed B pulls the module back to the base; PEFT users' default (torch's AdamW) decays both as well.
    """
    return {path: not path.endswith(("norm.weight", ".bias")) for path in params}
