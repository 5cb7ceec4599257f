"""The jitted device steps of training: add up a micro-batch, apply a step, evaluate. Pure functions over pytrees.

A step's loss is the sum over its target tokens divided by their number, over all its micro-batches and devices. Whether it
is applied is decided on the device: a step with anything that is not finite leaves parameters and optimizer as they were.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.mesh import parameter_sharding, replicated
from pshare_jax.model.params import Params
from pshare_jax.training.trainee import Tallies, Trainee, nll


class TrainState(NamedTuple):
    """What a step changes. `applied` counts applied steps, `bad` the steps since the last of them, `all_bad` all others."""

    trainable: Params
    optimizer: optax.OptState
    applied: Int[Array, ""]
    bad: Int[Array, ""]
    all_bad: Int[Array, ""]


class Sums(NamedTuple):
    """Sums over the micro-batches of a step: gradients of the negative log-likelihood, itself, target tokens, argmax hits."""

    gradients: Params
    nll: Float[Array, ""]
    tokens: Float[Array, ""]
    correct: Float[Array, ""]


class StepResult(NamedTuple):
    """What is told of a step: mean loss, target tokens, hits, global norm of the mean gradient before clipping."""

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    correct: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    applied: Bool[Array, ""]
    bad: Int[Array, ""]
    all_bad: Int[Array, ""]


@dataclass(frozen=True)
class TrainSteps:
    """Compiled on first use. `accumulate` and `apply` take their `Sums` (and `apply` its state) over: they are donated."""

    init: Callable[[Params], TrainState]
    no_sums: Callable[[], Sums]
    accumulate: Callable[[Sums, Params, Params, Params, Any, int | np.int32], Sums]
    apply: Callable[[TrainState, Sums], tuple[TrainState, Sums, StepResult]]
    evaluate: Callable[[Params, Params, Params, Any], tuple[Array, Tallies]]


def train_steps(
    trainee: Trainee, optimizer: optax.GradientTransformation, schedule: optax.Schedule, seed: int
) -> TrainSteps:
    """The steps for a trainee on its base's mesh; all results keep the sharding of the parameter table.

    `accumulate` takes the number of its micro-batch in the run, which with `seed` decides what dropout draws.
    """
    shardings = state_shardings(trainee, optimizer)
    shapes = {path: x.shape for path, x in trainee.trainable.items()}
    whole = replicated(trainee.base.mesh)
    # Nobody needs the first values once they are in a state.
    trainee = replace(trainee, trainable={})
    sums_out = Sums._make([shardings.trainable, whole, whole, whole])

    def init(trainable: Params) -> TrainState:
        zero = jnp.int32(0)
        # Arrays of its own: the state is donated step by step, and these may be the base's.
        return TrainState(jax.tree.map(jnp.copy, trainable), optimizer.init(trainable), zero, zero, zero)

    def no_sums() -> Sums:
        gradients = {path: jnp.zeros(shape, jnp.float32) for path, shape in shapes.items()}
        return Sums(gradients, *(jnp.float32(0) for _ in range(3)))

    def accumulate(
        sums: Sums, trainable: Params, frozen: Params, base_params: Params, batch: Any, number: Int[Array, ""]
    ) -> Sums:
        key = jax.random.fold_in(jax.random.key(seed), number)

        def loss(trainable: Params) -> tuple[Array, Tallies]:
            return nll(trainee, trainable, frozen, base_params, batch, key)

        (value, tallies), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        gradients = jax.tree.map(jnp.add, sums.gradients, gradients)
        return Sums(gradients, sums.nll + value, sums.tokens + tallies.tokens, sums.correct + tallies.correct)

    def apply(state: TrainState, sums: Sums) -> tuple[TrainState, Sums, StepResult]:
        tokens = jnp.maximum(sums.tokens, 1)
        mean = jax.tree.map(lambda gradient: gradient / tokens, sums.gradients)
        loss, grad_norm = sums.nll / tokens, optax.tree.norm(mean)
        updates, optimizer_state = optimizer.update(mean, state.optimizer, state.trainable)
        changed = (optax.apply_updates(state.trainable, updates), optimizer_state)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & _all_finite(changed)
        trainable, optimizer_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), changed, (state.trainable, state.optimizer)
        )
        counted = jnp.where(good, 0, 1)
        after = TrainState(
            trainable,
            optimizer_state,
            state.applied + 1 - counted,
            jnp.where(good, 0, state.bad + 1),
            state.all_bad + counted,
        )
        result = StepResult(
            loss,
            sums.tokens,
            sums.correct,
            grad_norm,
            jnp.asarray(schedule(state.applied), jnp.float32),
            good,
            after.bad,
            after.all_bad,
        )
        return after, no_sums(), result

    def evaluate(trainable: Params, frozen: Params, base_params: Params, batch: Any) -> tuple[Array, Tallies]:
        return nll(trainee, trainable, frozen, base_params, batch, None)

    return TrainSteps(
        init=jax.jit(init, out_shardings=shardings),
        no_sums=jax.jit(no_sums, out_shardings=sums_out),
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=sums_out),
        apply=jax.jit(apply, donate_argnums=(0, 1), out_shardings=(shardings, sums_out, whole)),
        evaluate=jax.jit(evaluate, out_shardings=whole),
    )


def state_shardings(trainee: Trainee, optimizer: optax.GradientTransformation) -> TrainState:
    """A `TrainState` of shardings: the optimizer's moments lie as their parameters do."""
    mesh = trainee.base.mesh
    trainable = {path: parameter_sharding(path, trainee.architecture.config, mesh) for path in trainee.trainable}
    state = jax.eval_shape(optimizer.init, trainee.trainable)
    whole = replicated(mesh)
    moments = optax.tree.map_params(
        optimizer, lambda _, sharding: sharding, state, trainable, transform_non_params=lambda _: whole
    )
    return TrainState._make([trainable, moments, whole, whole, whole])


def _all_finite(tree: Any) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))
