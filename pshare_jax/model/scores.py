"""The result of a scoring step: log-probabilities of given tokens and of the best tokens. Computed by the paged steps."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pshare_jax.mesh import replicated
from pshare_jax.sampling.sample import best_logprobs


class Scores(NamedTuple):
    """Log-probabilities of the targets, and ids and log-probabilities of the best tokens in descending order."""

    logprobs: Float[Array, "B T"]
    top_ids: Int[Array, "B T top"]
    top_logprobs: Float[Array, "B T top"]


def scores_of(logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mesh: Mesh) -> Scores:
    """The scores of the targets."""
    # Replicated, like the sampler's logits.
    flat = jax.lax.with_sharding_constraint(logits.reshape(targets.size, -1), replicated(mesh))
    scores = best_logprobs(flat, targets.reshape(-1))
    return Scores(*(part.reshape(*targets.shape, *part.shape[1:]) for part in scores))
