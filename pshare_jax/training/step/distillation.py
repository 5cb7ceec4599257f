"""Distillation: the divergence of the module's next-token distribution, on the base's KV, from a teacher's on its own KV.

The loss of a token is weight * T^2 * KL(teacher || module) + (1 - weight) * -log p, with both distributions of the divergence at
temperature T (Hinton et al., arXiv 1503.02531: T^2 keeps its gradients' size). The teacher's program (`guide.py`) gives its
hidden states at the targets, whose logits are computed again in each chunk, or with `top_k` its best tokens.

With `top_k` the divergence is between distributions over k + 1 outcomes: the teacher's k best tokens, and any other. It is never
more than the divergence over all tokens, equal to it for k = V, and 0 only if the module gives each of the k tokens the teacher's
probability. Renormalised to the k tokens it would leave free how much the module gives to all others.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pshare_jax.training.step.chunks import Head, each_token, logits_of, sums_over_tokens
from pshare_jax.training.step.cross_entropy import token_nll
from pshare_jax.training.step.losses import Batch, Guided, Tallies


class Best(NamedTuple):
    """A teacher's best tokens, their log-probabilities, and the log-probability of all others together."""

    tokens: Int[Array, "*tokens k"]
    logprobs: Float[Array, "*tokens k"]
    others: Float[Array, "*tokens"]


@dataclass(frozen=True)
class Distillation:
    """Distillation with the divergence's `weight`, its `temperature`, and the number of the teacher's tokens (None: all)."""

    weight: float
    temperature: float
    top_k: int | None
    metrics: ClassVar[tuple[str, ...]] = ("kl", "nll")
    logits_arrays: ClassVar[int] = 6
    guide_kv: ClassVar[Literal["own", "same"] | None] = "own"

    def signal(self, head: Head, hidden: Float[Array, "B D size"], batch: Batch) -> Any:
        """The teacher's hidden states, or its best tokens."""
        return hidden if self.top_k is None else each_token(self._best, head, hidden)

    def __call__(
        self, head: Head, hidden: Float[Array, "B D size"], batch: Batch, guided: Guided | None
    ) -> tuple[Float[Array, ""], Tallies]:
        """The loss and its tallies; means are over target tokens. The metric kl has no factor T^2."""
        assert guided is not None
        real = jnp.asarray(batch.weights)
        inputs = (jnp.asarray(batch.targets), real, guided.signal)
        loss = _TokenLoss(self, head.tied, head.softcap)
        teacher = guided.head.astype(hidden.dtype) if self.top_k is None else None
        total, kl, nll, correct = sums_over_tokens(loss, head, hidden, inputs, teacher)
        return total, Tallies(real.sum(), correct, real.sum(), {"kl": kl, "nll": nll})

    def _best(self, logits: Array, _: Any) -> Best:
        logprobs = jax.nn.log_softmax(logits / self.temperature)
        values, tokens = jax.lax.top_k(logprobs, min(self.top_k or 0, logits.shape[1]))
        return Best(tokens, values, _logsumexp_of_others(logprobs, tokens))


@dataclass(frozen=True)
class _TokenLoss:
    """The loss of a chunk: sums of loss, divergence, negative log-likelihood and argmax hits, and the loss's gradient."""

    distillation: Distillation
    tied: bool
    softcap: float | None

    def __call__(self, logits: Array, inputs: Any, teacher: Array | None) -> tuple[tuple[Array, ...], Array]:
        targets, real, told = inputs
        weight, temperature = self.distillation.weight, self.distillation.temperature
        (nll, correct), nll_grad = token_nll(logits, (targets, real), None)
        logprobs = jax.nn.log_softmax(logits / temperature)
        if teacher is None:
            kl, wanted = _from_best(logprobs, told)
        else:
            theirs = jax.nn.log_softmax(logits_of(told, teacher, self.tied, self.softcap) / temperature)
            wanted = jnp.exp(theirs)
            kl = (wanted * (theirs - logprobs)).sum(-1)
        kl = jnp.sum(kl * real)
        grad = weight * temperature * (jnp.exp(logprobs) - wanted) * real[:, None]
        total = weight * temperature**2 * kl + (1 - weight) * nll
        return (total, kl, nll, correct), grad + (1 - weight) * nll_grad


def _from_best(logprobs: Float[Array, "N V"], best: Best) -> tuple[Float[Array, "N"], Float[Array, "N V"]]:
    """The divergence over the teacher's best tokens and all others together, and the distribution towards which its gradient
    moves the module: the teacher's, with its probability of all others shared among them as the module does.
    """
    ours = jnp.take_along_axis(logprobs, best.tokens, axis=1)
    our_others = _logsumexp_of_others(logprobs, best.tokens)
    p, p_others = jnp.exp(best.logprobs), jnp.exp(best.others)
    # Either may give the others nothing, such as where there are none.
    some = (p_others > 0) & jnp.isfinite(our_others)
    ratio = jnp.where(some, best.others - our_others, 0)
    kl = (p * (best.logprobs - ours)).sum(-1) + p_others * ratio
    shared = jnp.where(some[:, None], jnp.exp(logprobs + ratio[:, None]), 0)
    rows = jnp.arange(len(logprobs))[:, None]
    return kl, shared.at[rows, best.tokens].set(p)


def _logsumexp_of_others(logprobs: Float[Array, "N V"], tokens: Int[Array, "N k"]) -> Float[Array, "N"]:
    """-inf if there are no others."""
    rows = jnp.arange(len(logprobs))[:, None]
    return jax.nn.logsumexp(logprobs.at[rows, tokens].set(-jnp.inf), axis=-1)
