"""Choose the next token from its logits: greedy, or a draw that depends on (seed, choice, position) alone.

One pure function for the plain loop and the server, so that the same request gives the same tokens in both.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ALMOST_GREEDY = 1e-5
"""Temperatures below this are greedy: scores divided by less overflow float32, and the draw would be the best token anyway."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose: `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off; `choice` numbers the n answers."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0


def sample(logits: Float[Array, "V"], params: SamplingParams, position: int) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The token for absolute `position`, and the gap between the two largest scores that the choice was made on."""
    if params.temperature < ALMOST_GREEDY:
        return _greedy(logits)
    return _draw(
        logits,
        jnp.float32(params.temperature),
        jnp.int32(params.top_k),
        jnp.float32(params.top_p),
        jnp.float32(params.min_p),
        # The two halves of a 64-bit seed, as jax.random.key would take them with 64-bit types switched on.
        jnp.array([params.seed >> 32 & 0xFFFFFFFF, params.seed & 0xFFFFFFFF], jnp.uint32),
        jnp.uint32(params.choice),
        jnp.uint32(position),
    )


def kept(
    scores: Float[Array, "V"], top_k: Int[Array, ""], top_p: Float[Array, ""], min_p: Float[Array, ""]
) -> Float[Array, "V"]:
    """Scores with all tokens outside top-k, then the top-p nucleus, then min-p put to -inf; the best one always stays."""
    size = scores.shape[0]
    order = jnp.argsort(-scores)
    ranked = scores[order]
    ranks = jnp.arange(size)
    inside = (top_k == 0) | (ranks < top_k)
    probabilities = jax.nn.softmax(jnp.where(inside, ranked, -jnp.inf))
    before = jnp.cumsum(probabilities) - probabilities
    # The sum of all probabilities may round to more than 1: at 1 the nucleus is everything.
    inside &= (before < top_p) | (top_p >= 1)
    inside &= probabilities >= min_p * probabilities[0]
    inside |= ranks == 0
    return jnp.full_like(scores, -jnp.inf).at[order].set(jnp.where(inside, ranked, -jnp.inf))


@jax.jit
def _greedy(logits: Array) -> tuple[Array, Array]:
    return _best(logits)


@jax.jit
def _draw(
    logits: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    min_p: Array,
    seed: Array,
    choice: Array,
    position: Array,
) -> tuple[Array, Array]:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, choice), position)
    scores = kept(logits / temperature, top_k, top_p, min_p)
    # Adding Gumbel noise and taking the largest draws from softmax(scores).
    return _best(scores + jax.random.gumbel(key, scores.shape))


def _best(scores: Array) -> tuple[Array, Array]:
    (first, second), (best, _) = jax.lax.top_k(scores, 2)
    return best, first - second
