"""The optimizer: gradient clipping, AdamW and a learning-rate schedule over the trainable parameters."""

import optax

from pshare_jax.model.architecture import Params
from pshare_jax.training.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optax chain for a run of `num_steps` steps; gradients are means over a step's target tokens."""
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
