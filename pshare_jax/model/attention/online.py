"""Online softmax (FlashAttention, arXiv 2205.14135, alg. 1): paged attention in both forms, `blocked` and the GPU kernel
(kernel.py), adds blocks of keys to such a state, and merges states of parts of the keys.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pshare_jax.model.layers import soft_cap


class Softmax(NamedTuple):
    """An online softmax: the highest score so far, the sum of weights, and the weighted values, all in float32."""

    highest: Float[Array, "... Q"]
    total: Float[Array, "... Q"]
    out: Float[Array, "... Q H"]

    @classmethod
    def of_nothing(cls, shape: tuple[int, ...]) -> "Softmax":
        """Of queries `[..., Q, H]`. Finite: scores of -inf add a weight of 0 to it, not NaN."""
        lowest = jnp.full(shape[:-1], jnp.finfo(jnp.float32).min, jnp.float32)
        return cls(lowest, jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(shape, jnp.float32))

    def add(self, scores: Float[Array, "... Q S"], values: Float[Array, "... S H"]) -> "Softmax":
        """The softmax with more keys, of which unseen ones have scores of -inf."""
        highest = jnp.maximum(self.highest, scores.max(-1))
        weights, shrink = jnp.exp(scores - highest[..., None]), jnp.exp(self.highest - highest)
        product = jnp.einsum(
            "...QS,...SH->...QH", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
        )
        return Softmax(highest, self.total * shrink + weights.sum(-1), self.out * shrink[..., None] + product)

    def merged(self) -> "Softmax":
        """The softmax with the keys of all parts, of which this has a leading axis (log-sum-exp)."""
        highest = self.highest.max(0)
        weights = jnp.exp(self.highest - highest)
        return Softmax(highest, (weights * self.total).sum(0), (weights[..., None] * self.out).sum(0))

    def result(self) -> Float[Array, "... Q H"]:
        """The weighted mean of the values."""
        return self.out / self.total[..., None]


def capped_scores(
    queries: Float[Array, "... Q H"], keys: Float[Array, "... S H"], softcap: float | None
) -> Float[Array, "... Q S"]:
    """Capped scores in float32."""
    return soft_cap(jnp.einsum("...QH,...SH->...QS", queries, keys, preferred_element_type=jnp.float32), softcap)
