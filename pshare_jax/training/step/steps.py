"""The jitted device programs of training: accumulate a micro-batch, apply a step, evaluate. Pure functions over
pytrees.

A step's loss is the mean over its target tokens (or pairs of answers), across all its micro-batches and devices. The device
decides whether the step is applied: if loss or gradient norm is not finite, parameters and optimizer state stay unchanged. That
is known before the update, so that each array is updated in its place; an update that overflows is only told
(`StepResult.finite`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.mesh import replicated
from pshare_jax.model.architecture import Params
from pshare_jax.training.step.losses import Tallies
from pshare_jax.training.step.mesh import step_compiler_options
from pshare_jax.training.step.objective import batch_loss
from pshare_jax.training.step.optimizer import UpdateRule
from pshare_jax.training.step.static import Objective


class TrainState(NamedTuple):
    """The state that a step updates: `applied` steps, `bad` steps since the last applied step, and `all_bad` steps."""

    trainable: Params
    optimizer: optax.OptState
    applied: Int[Array, ""]
    bad: Int[Array, ""]
    all_bad: Int[Array, ""]


class Sums(NamedTuple):
    """Sums over the micro-batches of a step: the loss with its gradients, and the tallies."""

    gradients: Params
    loss: Float[Array, ""]
    tallies: Tallies


class StepResult(NamedTuple):
    """Metrics of a step: mean loss, target tokens, argmax hits, norm of the mean gradient before clipping, counters,
    whether all weights are finite after it, and the means of the objective's own metrics.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    correct: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    applied: Bool[Array, ""]
    bad: Int[Array, ""]
    all_bad: Int[Array, ""]
    finite: Bool[Array, ""]
    metrics: dict[str, Float[Array, ""]]


@dataclass(frozen=True)
class TrainSteps:
    """The programs, compiled on first use; `state` holds shapes and shardings of the result of `init`.

    `accumulate` donates its `Sums` and `apply` its state. For steps with one micro-batch, `accumulate` takes None, so
    that there is no second copy of the gradients.
    """

    state: TrainState
    init: Callable[[Params], TrainState]
    no_sums: Callable[[], Sums]
    accumulate: Callable[[Sums | None, Params, Params, Params, Any, int | np.int32], Sums]
    apply: Callable[[TrainState, Sums], tuple[TrainState, StepResult]]
    evaluate: Callable[[Params, Params, Params, Any], tuple[Array, Tallies]]


class LossSteps(NamedTuple):
    """The programs of `TrainSteps` that do not depend on the optimizer, so that runs of one process can share them."""

    no_sums: Callable[[], Sums]
    accumulate: Callable[[Sums | None, Params, Params, Params, Any, int | np.int32], Sums]
    evaluate: Callable[[Params, Params, Params, Any], tuple[Array, Tallies]]


def train_steps(objective: Objective, rule: UpdateRule, seed: int, loss: LossSteps | None = None) -> TrainSteps:
    """The programs for an objective on its mesh; results keep the sharding of the parameter table. `loss` None is that of
    `loss_steps`.
    """
    optimizer = rule.transform
    state = state_shapes(objective, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    whole = replicated(objective.mesh)

    def init(trainable: Params) -> TrainState:
        zero = jnp.int32(0)
        # Copied because the state is donated and these arrays may belong to the base.
        masters = jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), trainable)
        return TrainState(masters, optimizer.init(masters), zero, zero, zero)

    def apply(state: TrainState, sums: Sums) -> tuple[TrainState, StepResult]:
        terms = jnp.maximum(sums.tallies.terms, 1)
        loss, grad_norm = sums.loss / terms, optax.tree.norm(sums.gradients) / terms
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        factor = rule.clip_factor(grad_norm) / terms

        def updated(trainable: Params, optimizer_state: optax.OptState) -> tuple[Params, optax.OptState]:
            gradients = {path: gradient * factor for path, gradient in sums.gradients.items()}
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, trainable)
            return cast(Params, optax.apply_updates(trainable, updates)), optimizer_state

        # A branch, not a choice between old and new arrays, which would keep both.
        trainable, optimizer_state = jax.lax.cond(
            good, updated, lambda *unchanged: unchanged, state.trainable, state.optimizer
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
            sums.tallies.tokens,
            sums.tallies.correct,
            grad_norm,
            jnp.asarray(rule.schedule(state.applied), jnp.float32),
            good,
            after.bad,
            after.all_bad,
            jnp.all(jnp.stack([jnp.isfinite(x).all() for x in trainable.values()])),
            {name: value / terms for name, value in sums.tallies.metrics.items()},
        )
        return after, result

    shared = loss_steps(objective, seed) if loss is None else loss
    options = step_compiler_options(objective.mesh)
    return TrainSteps(
        state=state,
        init=jax.jit(init, out_shardings=shardings),
        no_sums=shared.no_sums,
        accumulate=shared.accumulate,
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(shardings, whole), compiler_options=options),
        evaluate=shared.evaluate,
    )


def loss_steps(objective: Objective, seed: int) -> LossSteps:
    """The programs of losses and gradients. `accumulate` takes the number of the micro-batch within the run, which with `seed`
    determines dropout.
    """
    whole = replicated(objective.mesh)
    shardings = {path: x.sharding for path, x in objective.trainable_shapes.items()}
    sums_out: Any = Sums(cast(Any, shardings), *scalar_sums(objective, lambda: whole))
    options = step_compiler_options(objective.mesh)

    def no_sums() -> Sums:
        gradients = {path: jnp.zeros(x.shape, jnp.float32) for path, x in objective.trainable_shapes.items()}
        return Sums(gradients, *scalar_sums(objective, lambda: jnp.float32(0)))

    def accumulate(
        sums: Sums | None, trainable: Params, frozen: Params, base_params: Params, batch: Any, number: Int[Array, ""]
    ) -> Sums:
        key = jax.random.fold_in(jax.random.key(seed), number)

        def loss(trainable: Params) -> tuple[Array, Tallies]:
            return batch_loss(objective, trainable, frozen, base_params, batch, key)

        (value, tallies), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        new = Sums(gradients, value, tallies)
        return new if sums is None else jax.tree.map(jnp.add, sums, new)

    def evaluate(trainable: Params, frozen: Params, base_params: Params, batch: Any) -> tuple[Array, Tallies]:
        return batch_loss(objective, trainable, frozen, base_params, batch, None)

    return LossSteps(
        no_sums=jax.jit(no_sums, out_shardings=sums_out),
        accumulate=jax.jit(accumulate, donate_argnums=0, out_shardings=sums_out, compiler_options=options),
        evaluate=jax.jit(evaluate, out_shardings=whole),
    )


def state_shapes(objective: Objective, optimizer: optax.GradientTransformation) -> TrainState:
    """A `TrainState` of shapes with shardings; the optimizer's moments are sharded like their parameters, and means of a
    moment's rows and columns, which are small, are on every device.
    """

    def moment(x: Any, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if x.shape != like.shape:
            return whole(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.sharding)

    def whole(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(objective.mesh))

    shapes = objective.trainable_shapes
    moments = optax.tree.map_params(
        optimizer,
        moment,
        jax.eval_shape(optimizer.init, shapes),
        shapes,
        transform_non_params=whole,
    )
    counter = whole(jax.ShapeDtypeStruct((), np.int32))
    return TrainState._make([shapes, moments, counter, counter, counter])


def scalar_sums(objective: Objective, scalar: Callable[[], Any]) -> tuple[Any, Tallies]:
    """A new `scalar` in each place of a `Sums` but the gradients."""
    metrics = {name: scalar() for name in objective.loss.metrics}
    return scalar(), Tallies(scalar(), scalar(), scalar(), metrics)
