"""Online softmax (FlashAttention, arXiv 2205.14135, alg. 1), and what the forms of paged attention have in common: the order
of queries, and attention to the new tokens, which are in no page yet.

`blocked` and the GPU kernel (kernel.py) add blocks of cached keys to such states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.model.attention.paged import visible_new
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

    def merge(self, parts: "Softmax") -> "Softmax":
        """The softmax with the keys of all parts `[P, ...]` (log-sum-exp)."""
        highest = jnp.maximum(self.highest, parts.highest.max(0))
        weights, shrink = jnp.exp(parts.highest - highest), jnp.exp(self.highest - highest)
        total = self.total * shrink + (weights * parts.total).sum(0)
        return Softmax(highest, total, self.out * shrink[..., None] + (weights[..., None] * parts.out).sum(0))


def capped_scores(
    queries: Float[Array, "... Q H"], keys: Float[Array, "... S H"], softcap: float | None
) -> Float[Array, "... Q S"]:
    """Capped scores in float32."""
    return soft_cap(jnp.einsum("...QH,...SH->...QS", queries, keys, preferred_element_type=jnp.float32), softcap)


def masked(scores: Float[Array, "*A Q S"], visible: Bool[Array, "*B T S"]) -> Float[Array, "*A Q S"]:
    """Scores with -inf at unseen keys; query q is of token q % T. `visible` is broadcast to `[*A, Q / T, T, S]`."""
    tokens = scores.reshape(*scores.shape[:-2], -1, *visible.shape[-2:])
    return jnp.where(visible, tokens, -jnp.inf).reshape(scores.shape)


def by_kv_head(q: Float[Array, "B T N H"], num_kv_heads: int, scale: float) -> Float[Array, "B K Q H"]:
    """Scaled queries by kv head, in the order (group, token)."""
    B, T, N, H = q.shape
    groups = N // num_kv_heads
    return q.reshape(B, T, num_kv_heads, groups, H).transpose(0, 2, 3, 1, 4).reshape(B, num_kv_heads, -1, H) * scale


def in_token_order(state: Softmax, like: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """The result of the softmax `[B, K, Q]` in the order and dtype of the queries that `by_kv_head` had."""
    B, T, N, H = like.shape
    heads = (state.out / state.total[..., None]).astype(like.dtype)
    return heads.reshape(B, heads.shape[1], -1, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def new_tokens(
    queries: Float[Array, "B K Q H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    window: int | None,
    softcap: float | None,
    independent: Bool[Array, ""] | None,
) -> Softmax:
    """The softmax over the new tokens; each sees itself, so all later maxima are those of real scores."""
    visible = jax.vmap(visible_new, in_axes=(0, None, None))(positions, window, independent)
    scores = masked(capped_scores(queries, k.swapaxes(1, 2), softcap), visible[:, None, None])
    return Softmax.of_nothing(queries.shape).add(scores, v.swapaxes(1, 2))
