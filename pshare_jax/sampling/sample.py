"""Choose the next token of each row of a batch: greedy, or a draw that depends on (seed, choice, position) alone.

One pure function for the plain loop and the server, so that the same request gives the same tokens in both. What is
chosen, and in which order scores are changed, is said in `SamplingParams`.

A row's result must not depend on the batch it is in, to the last bit. A compiler may order a float sum differently for
each number of rows, so there is no float reduction here: sums are fixed trees of elementwise additions, and a maximum
comes from `top_k`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from pshare_jax.sampling.params import ALMOST_GREEDY, NUM_TOP, SamplingParams, SamplingRows, sampling_rows

__all__ = [
    "Adjustments",
    "Sampled",
    "SamplingParams",
    "SamplingRows",
    "best_logprobs",
    "kept",
    "sample",
    "sample_rows",
    "sampling_rows",
]

FEW = 1024
"""Top-k, top-p and min-p look at so many best tokens first; sorting a whole vocabulary takes 20 times as long on a CPU."""


class Adjustments(NamedTuple):
    """Changes to the rows' logits: `bias` is added (-inf bans), `repeated` are the tokens that were there before."""

    bias: Float[Array, "B V"] | Float[np.ndarray, "B V"]
    repeated: Bool[Array, "B V"] | Bool[np.ndarray, "B V"]


class Sampled(NamedTuple):
    """The rows' new token ids; the gap between the two largest scores that each choice was made on; and logprobs.

    The logprobs are of the raw logits: the chosen id's, and those of the min(20, V) best tokens, best first.
    """

    ids: Int[Array, "B"]
    gaps: Float[Array, "B"]
    logprobs: Float[Array, "B"]
    top_ids: Int[Array, "B top"]
    top_logprobs: Float[Array, "B top"]


def sample_rows(
    logits: Float[Array, "B V"],
    rows: SamplingRows,
    adjustments: Adjustments,
    drawn: Bool[ArrayLike, ""],
    adjusted: Bool[ArrayLike, ""],
    wants_logprobs: Bool[ArrayLike, ""],
) -> Sampled:
    """One token a row; to be jitted by the caller, one compile for each shape.

    The flags are the whole batch's and save time: without `drawn` all rows are greedy, without `adjusted` neither
    `adjustments` nor repetition penalties are looked at, without `wants_logprobs` those fields are zeros.
    """
    logits = logits.astype(jnp.float32)
    scores = lax.cond(adjusted, _adjusted, lambda logits, *_: logits, logits, rows, adjustments)
    # `top_k` puts 0.0 before -0.0, which are one score.
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = lax.cond(drawn, _noisy, lambda scores, _: scores, scores, rows)
    ids, gaps = _best(scores)
    return Sampled(ids, gaps, *lax.cond(wants_logprobs, best_logprobs, _no_logprobs, logits, ids))


def sample(
    logits: Float[Array, "V"], params: SamplingParams, position: int, adjustments: Adjustments | None = None
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The token for absolute `position`, and the gap between the two largest scores that the choice was made on.

    `adjustments` has one row; None changes nothing, so that only a repetition penalty, bias or bans need one.
    """
    rows = sampling_rows([params], [position], 1)
    sampled = _sample_row(logits[None], rows, adjustments, np.array(not params.is_greedy))
    return sampled.ids[0], sampled.gaps[0]


def best_logprobs(
    logits: Float[Array, "B V"], ids: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """Log-probabilities of `ids`, and ids and log-probabilities of the min(20, V) best tokens, best first."""
    values, top_ids = _top(logits, min(NUM_TOP, logits.shape[-1]))
    best = values[:, :1]
    log_total = jnp.log(_sum(jnp.exp(logits - best)))[:, None]
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)
    return (chosen - best - log_total)[:, 0], top_ids, values - best - log_total


def kept(
    scores: Float[Array, "*B V"], top_k: Int[Array, "*B"], top_p: Float[Array, "*B"], min_p: Float[Array, "*B"]
) -> Float[Array, "*B V"]:
    """Scores with all tokens outside top-k, then the top-p nucleus, then min-p put to -inf; the best one always stays.

    Of equal scores the lower id goes first. A row with all three off is left as it is, and if all are, nothing is sorted.
    """
    off = (top_k == 0) & (top_p >= 1) & (min_p <= 0)

    def cut(num: int, total: Array) -> tuple[Array, Array]:
        masked, complete = _cut(scores, total, num, top_k, top_p, min_p)
        return jnp.where(off[..., None], scores, masked), (off | complete).all()

    def limited() -> Array:
        size = scores.shape[-1]
        # Only top-p needs to know of all tokens, and of the rest no more than this sum.
        total = _sum(jnp.exp(scores - _top(scores, 1)[0]))
        masked, complete = cut(min(FEW, size), total)
        return masked if size <= FEW else lax.cond(complete, lambda: masked, lambda: cut(size, total)[0])

    return lax.cond(off.all(), lambda: scores, limited)


def _cut(
    scores: Array, total: Array, num: int, top_k: Array, top_p: Array, min_p: Array
) -> tuple[Float[Array, "*B V"], Bool[Array, "*B"]]:
    """`kept`'s scores where only the `num` best tokens may stay, and whether no other would have stayed.

    `total` is the sum of exp(score - best) over all tokens.
    """
    top_k, top_p, min_p = (jnp.expand_dims(x, -1) for x in (top_k, top_p, min_p))
    ranked, order = _top(scores, num)
    ranks = jnp.arange(num)
    weights = jnp.exp(ranked - ranked[..., :1])
    # The i-th prefix sum adds the same numbers in the same order, however many follow.
    sums = lax.associative_scan(jnp.add, weights, axis=-1)
    last = jnp.clip(top_k, 1, num) - 1
    total = jnp.where(top_k == 0, total[..., None], jnp.take_along_axis(sums, last, axis=-1))
    inside = (top_k == 0) | (ranks < top_k)
    # The sum of all may round to less than a prefix: at 1 the nucleus is everything.
    inside &= (sums - weights < top_p * total) | (top_p >= 1)
    inside &= weights >= min_p
    inside |= ranks == 0
    # All from the first one outside on are outside: rounding may not let a token in again.
    inside = ranks < jnp.where(inside, num, ranks).min(-1, keepdims=True)
    nothing = jnp.full_like(scores, -jnp.inf)
    masked = jnp.put_along_axis(nothing, order, jnp.where(inside, ranked, -jnp.inf), axis=-1, inplace=False)
    return masked, ~inside[..., -1] & (top_k[..., 0] <= num)


@jax.jit
def _sample_row(logits: Array, rows: SamplingRows, adjustments: Adjustments | None, drawn: Array) -> Sampled:
    unread = Adjustments(jnp.zeros(logits.shape), jnp.zeros(logits.shape, bool))
    adjusted = np.array(adjustments is not None)
    return sample_rows(logits, rows, adjustments or unread, drawn, adjusted, np.array(False))


def _adjusted(logits: Array, rows: SamplingRows, adjustments: Adjustments) -> Array:
    penalty = rows.repetition_penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(adjustments.repeated, penalized, logits) + adjustments.bias


def _noisy(scores: Array, rows: SamplingRows) -> Array:
    """Scores of which the largest is a draw from softmax(kept scores / temperature); greedy rows are left as they are."""
    greedy = rows.temperature < ALMOST_GREEDY
    scaled = scores / jnp.where(greedy, 1, rows.temperature)[:, None]
    # A greedy row's limits would only cost a sort.
    limits = jnp.where(greedy, 0, rows.top_k), jnp.where(greedy, 1, rows.top_p), jnp.where(greedy, 0, rows.min_p)
    scaled = kept(scaled, *limits)
    noise = jax.vmap(lambda *row: _noise(scores.shape[-1], *row))(rows.seed, rows.choice, rows.position)
    return jnp.where(greedy[:, None], scores, scaled + noise)


def _noise(size: int, seed: Array, choice: Array, position: Array) -> Array:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(key, choice), position), (size,))


def _best(scores: Array) -> tuple[Array, Array]:
    if scores.shape[-1] == 1:
        return jnp.zeros(scores.shape[:-1], jnp.int32), jnp.full(scores.shape[:-1], jnp.inf)
    values, ids = _top(scores, 2)
    return ids[..., 0], values[..., 0] - values[..., 1]


def _no_logprobs(logits: Array, ids: Array) -> tuple[Array, Array, Array]:
    shape = (logits.shape[0], min(NUM_TOP, logits.shape[-1]))
    return jnp.zeros(ids.shape), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)


def _top(values: Float[Array, "*B V"], num: int) -> tuple[Float[Array, "*B num"], Int[Array, "*B num"]]:
    """The `num` largest and their ids; the lower id first where values are equal."""
    # Where the compiler sees that only a part of the result is used, it sorts everything on a CPU: 20 to 200 times slower.
    # The zero keeps the barrier apart from the top-k itself, on which XLA's partitioner for several devices dies.
    best, ids, _ = lax.optimization_barrier((*lax.top_k(values, num), jnp.int32(0)))
    return best, ids


def _sum(values: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """The sum over the last axis, added in halves."""
    size = 1 << (values.shape[-1] - 1).bit_length()
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])])
    while size > 1:
        size //= 2
        values = values[..., :size] + values[..., size:]
    return values[..., 0]
