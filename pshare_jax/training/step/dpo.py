"""Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7): of two answers to one prompt, the chosen answer
shall gain more log-probability over the initial module than the rejected answer.

In two streams the answers are two turns over one context, whose KV the base computes once. The initial module's
log-probabilities are computed batch by batch, by a program of its own (`guide.py`): a pass over all samples before training
would save a quarter of a step's work only in a second epoch, and its result had to be stored and checked on resume.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pshare_jax.training.data.batches import TwoStreamBatch
from pshare_jax.training.step.chunks import Head
from pshare_jax.training.step.cross_entropy import token_logprobs
from pshare_jax.training.step.losses import Batch, Guided, Tallies


@dataclass(frozen=True)
class Dpo:
    """DPO with `beta`, the strength of the pull towards the initial module."""

    beta: float
    metrics: ClassVar[tuple[str, ...]] = ("preferred", "margin")
    logits_arrays: ClassVar[int] = 3
    guide_kv: ClassVar[Literal["own", "same"] | None] = "same"

    def signal(self, head: Head, hidden: Float[Array, "B D size"], batch: Batch) -> Any:
        """The initial module's log-probability of each target."""
        return token_logprobs(head, hidden, jnp.asarray(batch.targets))[0]

    def __call__(
        self, head: Head, hidden: Float[Array, "B D size"], batch: Batch, guided: Guided | None
    ) -> tuple[Float[Array, ""], Tallies]:
        """The loss and its tallies; means are over pairs. The metrics are the share of pairs with a positive margin, and beta
        times the chosen answer's gain less the rejected answer's.
        """
        assert guided is not None
        real, answers = jnp.asarray(batch.weights), answer_numbers(batch)
        logprobs, hits = token_logprobs(head, hidden, jnp.asarray(batch.targets))
        gains = _sums_of_answers((logprobs - guided.signal) * real, answers)
        pairs = (_sums_of_answers(real, answers)[:, 1::2] > 0).astype(jnp.float32)
        margins = self.beta * (gains[:, ::2] - gains[:, 1::2])
        loss = jnp.sum(jax.nn.softplus(-margins) * pairs)
        metrics = {"preferred": jnp.sum((margins > 0) * pairs), "margin": jnp.sum(margins * pairs)}
        return loss, Tallies(real.sum(), jnp.sum(hits * real), pairs.sum(), metrics)


def answer_numbers(batch: Batch) -> Int[Array, "B D"]:
    """The number of each target's answer within its row, from 1: odd numbers are chosen answers, and the next number is the
    rejected answer to the same prompt; 0 is padding.
    """
    if isinstance(batch, TwoStreamBatch):
        return jnp.asarray(batch.decode_turns)
    # In one stream each answer has a segment of its own.
    numbers = jnp.take_along_axis(jnp.asarray(batch.segments), jnp.asarray(batch.picks), axis=1)
    return jnp.where(jnp.asarray(batch.weights) > 0, numbers, 0)


def _sums_of_answers(values: Float[Array, "B D"], answers: Int[Array, "B D"]) -> Float[Array, "B A"]:
    """The sums over each answer's tokens; A is even, and no row has more answers."""
    most = 2 * (values.shape[1] // 2)
    return jax.vmap(lambda x, at: jax.ops.segment_sum(x, at, most + 1))(values, answers)[:, 1:]
