"""Chooses the next token of each row of a batch: greedy, or a draw that depends on (seed, choice, position) alone.

Generation and the server call the same pure function, so the same request gives the same tokens in both. `SamplingParams`
documents the order of the steps.

A row's result must not depend on its batch, bit for bit. A compiler may order a float sum differently for each number of
rows, so there is no float reduction here: sums are fixed trees of elementwise additions, and maxima come from `top_k`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from pshare_jax.sampling.params import ALMOST_GREEDY, NUM_TOP, SamplingParams, SamplingRows, all_allowed, sampling_rows

FEW = 1024
"""Top-k, top-p and min-p first look at this many best tokens; only rows that may keep more search the whole vocabulary."""

BLOCK, FEW_BLOCKS = 256, 32
"""At most `FEW_BLOCKS` best tokens are looked for in as many blocks, those with the largest best tokens."""


class Adjustments(NamedTuple):
    """Changes to the rows' logits: `bias` is added (-inf bans), `repeated` marks tokens of prompt and completion."""

    bias: Float[Array, "B V"] | Float[np.ndarray, "B V"]
    repeated: Bool[Array, "B V"] | Bool[np.ndarray, "B V"]


class Sampled(NamedTuple):
    """The rows' new token ids, the gap between the two largest final scores of each row, and logprobs.

    The logprobs are those of the raw logits: the chosen id's, and those of the min(20, V) best tokens, best first.
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
    masks: Int[ArrayLike, "B words"],
    drawn: Bool[ArrayLike, ""],
    adjusted: Bool[ArrayLike, ""],
    masked: Bool[ArrayLike, ""],
    wants_logprobs: Bool[ArrayLike, ""],
) -> Sampled:
    """One token per row; to be jitted by the caller, one program per shape.

    `masks` say which tokens are allowed (params.py: `all_allowed`). The flags apply to the whole batch and save time: without
    `drawn` all rows are greedy, without `adjusted` the `adjustments` and repetition penalties are ignored, without `masked`
    the masks, and without `wants_logprobs` the logprobs are zeros.
    """
    logits = logits.astype(jnp.float32)
    scores = lax.cond(adjusted, adjusted_scores, lambda logits, *_: logits, logits, rows, adjustments)
    return choose(logits, scores, rows, masks, drawn, masked, wants_logprobs)


def choose(
    logits: Float[Array, "B V"],
    scores: Float[Array, "B V"],
    rows: SamplingRows,
    masks: Int[ArrayLike, "B words"],
    drawn: Bool[ArrayLike, ""],
    masked: Bool[ArrayLike, ""],
    wants_logprobs: Bool[ArrayLike, ""],
) -> Sampled:
    """`sample_rows` from the adjusted scores on: steps 4 and 5, and the logprobs of `logits`."""
    scores = lax.cond(masked, _masked, lambda scores, _: scores, scores, masks)
    # `top_k` ranks 0.0 above -0.0, but they are the same score.
    scores = jnp.where(scores == 0, 0.0, scores)
    scores = lax.cond(drawn, _noisy, lambda scores, _: scores, scores, rows)
    ids, gaps = _best(scores)
    return Sampled(ids, gaps, *lax.cond(wants_logprobs, best_logprobs, _no_logprobs, logits, ids))


def sample(
    logits: Float[Array, "V"], params: SamplingParams, position: int, adjustments: Adjustments | None = None
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The token for absolute `position`, and the gap between the two largest final scores.

    `adjustments` has one row; it is needed only for a repetition penalty, bias or bans.
    """
    rows = sampling_rows([params], [position], 1)
    sampled = _sample_row(logits[None], rows, adjustments, np.array(not params.is_greedy))
    return sampled.ids[0], sampled.gaps[0]


def best_logprobs(
    logits: Float[Array, "B V"], ids: Int[Array, "B"]
) -> tuple[Float[Array, "B"], Int[Array, "B top"], Float[Array, "B top"]]:
    """Logprobs of `ids`, and ids and logprobs of the min(20, V) best tokens, best first."""
    values, top_ids = _top(logits, min(NUM_TOP, logits.shape[-1]))
    best = values[:, :1]
    log_total = jnp.log(_sum(jnp.exp(logits - best)))[:, None]
    chosen = jnp.take_along_axis(logits, ids[:, None], axis=-1)
    return (chosen - best - log_total)[:, 0], top_ids, values - best - log_total


def kept(
    scores: Float[Array, "*B V"], top_k: Int[Array, "*B"], top_p: Float[Array, "*B"], min_p: Float[Array, "*B"]
) -> Float[Array, "*B V"]:
    """Scores with the tokens outside top-k, then the top-p nucleus, then min-p set to -inf; the best token always stays.

    Of equal scores the lower id ranks first. A row with all three off is unchanged; if all rows are, nothing is sorted.
    """
    off = (top_k == 0) & (top_p >= 1) & (min_p <= 0)

    def limited() -> Array:
        # Only top-p depends on all tokens, and only through this sum.
        total = _sum(jnp.exp(scores - _top(scores, 1)[0]))
        masked, complete = _cut(scores, total, top_k, top_p, min_p)
        masked = jnp.where(off[..., None], scores, masked)
        given = scores, masked, off | complete, total, top_k, top_p, min_p
        return lax.cond((off | complete).all(), lambda: masked, lambda: _each_row(_searched, given))

    return lax.cond(off.all(), lambda: scores, limited)


def _cut(
    scores: Array, total: Array, top_k: Array, top_p: Array, min_p: Array
) -> tuple[Float[Array, "*B V"], Bool[Array, "*B"]]:
    """`kept`'s scores where only the `FEW` best tokens may stay, and whether this is exact (no other would stay).

    `total` is the sum of exp(score - best) over all tokens.
    """
    num = min(FEW, scores.shape[-1])
    top_k, top_p, min_p = (jnp.expand_dims(x, -1) for x in (top_k, top_p, min_p))
    ranked, order = _top(scores, num)
    ranks = jnp.arange(num)
    weights = jnp.exp(ranked - ranked[..., :1])
    sums = lax.associative_scan(jnp.add, weights, axis=-1)
    last = jnp.clip(top_k, 1, num) - 1
    total = jnp.where(top_k == 0, total[..., None], jnp.take_along_axis(sums, last, axis=-1))
    inside = (top_k == 0) | (ranks < top_k)
    # The total may round to less than a prefix sum: a top_p of 1 keeps everything.
    inside &= (sums - weights < top_p * total) | (top_p >= 1)
    inside &= weights >= min_p
    inside |= ranks == 0
    # Everything after the first token outside is outside: rounding must not readmit a token.
    inside = ranks < jnp.where(inside, num, ranks).min(-1, keepdims=True)
    nothing = jnp.full_like(scores, -jnp.inf)
    masked = jnp.put_along_axis(nothing, order, jnp.where(inside, ranked, -jnp.inf), axis=-1, inplace=False)
    exact = (~inside[..., -1] & (top_k[..., 0] <= num)) | (top_k[..., 0] == num) | (num == scores.shape[-1])
    return masked, exact


def _searched(
    scores: Float[Array, "V"],
    masked: Float[Array, "V"],
    complete: Bool[Array, ""],
    total: Float[Array, ""],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    min_p: Float[Array, ""],
) -> Float[Array, "V"]:
    """A row's kept scores: `masked` if that is `complete`, else by bisection, without a sort.

    A token is kept if the tokens that rank before it are fewer than top-k, and if their share is less than top-p. Counts and
    sums of sets that grow never fall, so one place divides the ranking.
    """

    def search() -> Array:
        weights = jnp.exp(scores - scores.max())
        everything = jnp.full(scores.shape, True)
        best = lax.cond(top_k == 0, lambda: everything, lambda: _first(scores, lambda before: before.sum() < top_k))
        limit = top_p * jnp.where(top_k == 0, total, _sum(jnp.where(best, weights, 0)))

        def in_nucleus(before: Array) -> Array:
            return _sum(jnp.where(before, weights, 0)) < limit

        nucleus = lax.cond(top_p >= 1, lambda: everything, lambda: _first(scores, in_nucleus))
        return jnp.where(best & nucleus & (weights >= min_p), scores, -jnp.inf)

    return lax.cond(complete, lambda: masked, search)


def _first(scores: Float[Array, "V"], inside: Callable[[Array], Array]) -> Bool[Array, "V"]:
    """The tokens for which `inside` is true of those that rank before them, a bool `[V]`.

    `inside` must be true of none, and, once it is false, of no larger set.
    """
    bits, ids = lax.bitcast_convert_type(scores, jnp.int32), jnp.arange(scores.shape[-1], dtype=jnp.int32)
    # Integers in the order of the scores.
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    lowest = _least(lambda key: inside(order > key), np.iinfo(np.int32).min, np.iinfo(np.int32).max)
    equal = order == lowest
    above = order > lowest
    last = -_least(lambda key: inside(above | (equal & (ids < -key))), -scores.shape[-1], 0)
    return above | (equal & (ids <= last))


def _least(holds: Callable[[Array], Array], low: int, high: int) -> Int[Array, ""]:
    """The least integer from `low` to `high` for which `holds`, as it does for all larger integers and for `high`."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        found = holds(middle)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    steps = (high - low).bit_length()
    return lax.fori_loop(0, steps, halve, (jnp.int32(low), jnp.int32(high)))[1]


def _each_row(function: Callable[..., Array], given: tuple[Array, ...]) -> Array:
    """Calls `function` on one row after another, since each may take a branch of its own."""
    if given[0].ndim == 1:
        return function(*given)
    return lax.map(lambda row: function(*row), given)


@jax.jit
def _sample_row(logits: Array, rows: SamplingRows, adjustments: Adjustments | None, drawn: Array) -> Sampled:
    unread = Adjustments(jnp.zeros(logits.shape), jnp.zeros(logits.shape, bool))
    adjusted = np.array(adjustments is not None)
    masks = all_allowed(*logits.shape)
    return sample_rows(logits, rows, adjustments or unread, masks, drawn, adjusted, np.array(False), np.array(False))


def adjusted_scores(logits: Float[Array, "B V"], rows: SamplingRows, adjustments: Adjustments) -> Float[Array, "B V"]:
    """Steps 1 to 3 of `SamplingParams`."""
    penalty = rows.repetition_penalty[:, None]
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(adjustments.repeated, penalized, logits) + adjustments.bias


def _masked(scores: Array, masks: Array) -> Array:
    """Scores with -inf where the mask's bit is 0."""
    return jnp.where(bits_in(masks, scores.shape[-1]), scores, -jnp.inf)


def bits_in(words: Int[Array, "B words"], size: int) -> Bool[Array, "B V"]:
    """The first `size` bits of each row: bit i of word w is that of token 32 * w + i."""
    bits = (words[:, :, None] >> jnp.arange(32)) & 1
    return bits.reshape(len(words), -1)[:, :size] == 1


def _noisy(scores: Array, rows: SamplingRows) -> Array:
    """Scores whose largest is a draw from softmax(kept scores / temperature); greedy rows are unchanged."""
    greedy = rows.temperature < ALMOST_GREEDY
    scaled = scores / jnp.where(greedy, 1, rows.temperature)[:, None]
    # Limits of a greedy row would cost a sort for nothing.
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
    """The `num` largest values and their ids; of equal values the lower id first."""
    size = values.shape[-1]
    if num > FEW_BLOCKS or size <= 2 * BLOCK * num:
        return _ranked(values, num)
    # Zeros of either sign are equal: a maximum may be any of them.
    values = jnp.where(values == 0, 0.0, values)
    padding = [(0, 0)] * (values.ndim - 1) + [(0, -size % BLOCK)]
    blocks = jnp.pad(values, padding, constant_values=-jnp.inf).reshape(*values.shape[:-1], -1, BLOCK)
    # A token outside of these blocks has `num` block maxima before it. In the order of ids, for equal values.
    chosen = jnp.sort(_ranked(blocks.max(-1), num)[1], axis=-1)
    candidates = jnp.take_along_axis(blocks, chosen[..., None], axis=-2)
    best, at = _ranked(candidates.reshape(*values.shape[:-1], -1), num)
    return best, jnp.take_along_axis(chosen, at // BLOCK, axis=-1) * BLOCK + at % BLOCK


def _ranked(values: Float[Array, "*B N"], num: int) -> tuple[Float[Array, "*B num"], Int[Array, "*B num"]]:
    """As `_top`, by ranking all values at once."""
    # If the compiler sees that only part of the result is used, it sorts everything on a CPU: 20 to 200 times slower.
    # The zero separates the barrier from the top-k, since XLA's partitioner crashes on a barrier of top-k alone.
    best, ids, _ = lax.optimization_barrier((*lax.top_k(values, num), jnp.int32(0)))
    return best, ids


def _sum(values: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """The sum over the last axis, by adding halves."""
    size = 1 << (values.shape[-1] - 1).bit_length()
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])])
    while size > 1:
        size //= 2
        values = values[..., :size] + values[..., size:]
    return values[..., 0]
