"""Supervised fine-tuning: the negative log-likelihood of the answers, and the log-probabilities of single tokens."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pshare_jax.training.step.chunks import Head, each_token, sums_over_tokens
from pshare_jax.training.step.losses import Batch, Guided, Tallies


@dataclass(frozen=True)
class Sft:
    """The sum of -log p over the target tokens."""

    metrics: ClassVar[tuple[str, ...]] = ()
    logits_arrays: ClassVar[int] = 3
    guide_kv: ClassVar[Literal["own", "same"] | None] = None

    def signal(self, head: Head, hidden: Float[Array, "B D size"], batch: Batch) -> Any:
        """Not used: there is no second model."""
        raise NotImplementedError

    def __call__(
        self, head: Head, hidden: Float[Array, "B D size"], batch: Batch, guided: Guided | None
    ) -> tuple[Float[Array, ""], Tallies]:
        """The loss and its tallies; the mean is over target tokens."""
        real = jnp.asarray(batch.weights)
        total, correct = rows_nll(head, hidden, jnp.asarray(batch.targets), real)
        return total, Tallies(real.sum(), correct, real.sum(), {})


def rows_nll(
    head: Head, hidden: Float[Array, "B D size"], targets: Int[Array, "B D"], real: Float[Array, "B D"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The float32 sum of -log softmax(logits)[target] over tokens with real = 1, and the number of argmax hits.

    Other values of `real` are weights of the tokens.
    """
    total, correct = sums_over_tokens(token_nll, head, hidden, (targets, real))
    return total, correct


def token_nll(logits: Array, inputs: tuple[Array, Array], constant: None) -> tuple[tuple[Array, Array], Array]:
    """A chunk's weighted sum of -log p and number of argmax hits, and the gradient: softmax less the target."""
    target, real = inputs
    best = logits.max(-1, keepdims=True)
    powers = jnp.exp(logits - best)
    total = powers.sum(-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)
    nll = (jnp.log(total) + best - chosen)[:, 0]
    correct = (chosen == best)[:, 0]
    one_hot = jnp.arange(logits.shape[1]) == target[:, None]
    return (jnp.sum(nll * real), jnp.sum(correct * real)), (powers / total - one_hot) * real[:, None]


def token_logprobs(
    head: Head, hidden: Float[Array, "B D size"], targets: Int[Array, "B D"]
) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
    """log p of each target, with gradients, and whether it has the largest logit.

    The gradient of their function is that of a sum of negative log-likelihoods with weights, so the backward pass is
    `rows_nll`'s: four matrix products in all, and no logits are kept.
    """
    return _logprobs(head._replace(weight=None), hidden, head.weight, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(head: Head, hidden: Array, weight: Array, targets: Array) -> tuple[Array, Array]:
    return each_token(_scores, head._replace(weight=weight), hidden, targets)


def _scores(logits: Array, target: Array) -> tuple[Array, Array]:
    chosen = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), (chosen == logits.max(-1)).astype(jnp.float32)


def _forward(head: Head, hidden: Array, weight: Array, targets: Array) -> tuple[Any, tuple[Array, Array, Array]]:
    return _logprobs(head, hidden, weight, targets), (hidden, weight, targets)


def _backward(
    head: Head, saved: tuple[Array, Array, Array], grads: tuple[Array, Array]
) -> tuple[Array, Array | None, None]:
    hidden, weight, targets = saved

    def weighted(hidden: Array, weight: Array) -> Array:
        return rows_nll(head._replace(weight=weight), hidden, targets, -grads[0])[0]

    if not head.trained:
        return jax.grad(weighted)(hidden, weight), None, None
    return *jax.grad(weighted, argnums=(0, 1))(hidden, weight), None


_logprobs.defvjp(_forward, _backward)
