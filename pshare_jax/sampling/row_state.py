"""What the sampler keeps on the device for the rows of a decode batch: last tokens, counts, prompts, biases and bans.

Each row slot has the state of the sequence that sits there; one slot more belongs to padding rows. `start_slot` writes a
sequence's start, `sample_slots` chooses the next tokens from logits and updates the state. Both are pure functions, to be
jitted by the caller (engine/sampler.py) with the state donated.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float32, Int, Int32

from pshare_jax.sampling.params import ALMOST_GREEDY, MAX_BIASES, SamplingParams, mask_words
from pshare_jax.sampling.sample import Adjustments, adjusted_scores, bits_in, choose
from pshare_jax.sampling.step_rows import StepRows, unpacked

STARTED = 512
"""Completion tokens that one call of `start_slot` counts; a longer completion takes more calls."""


class RowState(NamedTuple):
    """The state of every slot, for scores that depend on more than the logits (params.py, steps 1 to 3).

    `counts` counts the completion's tokens. `prompt` and `banned` have a bit for each token, as masks have. `bias_ids` are
    the tokens with a `logit_bias`, padded with the vocabulary's size.
    """

    counts: Int[Array, "slots V"]
    prompt: Int32[Array, "slots words"]
    banned: Int32[Array, "slots words"]
    bias_ids: Int32[Array, "slots biases"]
    biases: Float32[Array, "slots biases"]


class SlotStart(NamedTuple):
    """What `start_slot` writes: NumPy arrays and numbers. Unless `fresh`, only the `completion` is counted, onto what is there.

    `completion` has ids, padded with the vocabulary's size.
    """

    slot: np.int32
    fresh: np.bool_
    token: np.int32
    prompt: Int32[np.ndarray, "words"]
    banned: Int32[np.ndarray, "words"]
    bias_ids: Int32[np.ndarray, "biases"]
    biases: Float32[np.ndarray, "biases"]
    completion: Int32[np.ndarray, "started"]


def empty_state(num_slots: int, vocab_size: int) -> RowState:
    """Zeros for `num_slots` slots, as NumPy arrays."""
    words, biases = mask_words(vocab_size), min(MAX_BIASES, vocab_size)
    arrays: Any = (
        np.zeros((num_slots, vocab_size), np.int32),
        np.zeros((num_slots, words), np.int32),
        np.zeros((num_slots, words), np.int32),
        np.full((num_slots, biases), vocab_size, np.int32),
        np.zeros((num_slots, biases), np.float32),
    )
    return RowState(*arrays)


def slot_starts(
    slot: int,
    prompt: Sequence[int],
    completion: Sequence[int],
    params: SamplingParams,
    banned: Collection[int],
    vocab_size: int,
) -> list[SlotStart]:
    """The calls that seat a sequence in `slot`: its last token is the next input. Ids in `banned` outside the vocabulary are
    ignored.

    Raises:
        PshareError: `logit_bias` has an id outside the vocabulary.
    """
    params.check_vocabulary(vocab_size)
    biases = params.bias_of_token
    num_biases = min(MAX_BIASES, vocab_size)
    token = completion[-1] if completion else prompt[-1]
    counted = completion if params.counts_completion else ()
    bits = bits_of(prompt if params.repetition_penalty != 1 else (), vocab_size)
    first = SlotStart(
        np.int32(slot),
        np.bool_(True),
        np.int32(token),
        bits,
        bits_of([token for token in banned if 0 <= token < vocab_size], vocab_size),
        _padded(list(biases), num_biases, np.int32, vocab_size),
        _padded(list(biases.values()), num_biases, np.float32, 0),
        _padded(counted[:STARTED], STARTED, np.int32, vocab_size),
    )
    rest = range(STARTED, len(counted), STARTED)
    more = [_padded(counted[start : start + STARTED], STARTED, np.int32, vocab_size) for start in rest]
    return [first, *[first._replace(fresh=np.bool_(False), completion=part) for part in more]]


def bits_of(tokens: Collection[int], vocab_size: int) -> Int32[np.ndarray, "words"]:
    """A mask's words in which the tokens' bits are set."""
    bits = np.zeros(mask_words(vocab_size) * 32, bool)
    bits[list(tokens)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def start_slot(
    tokens: Int32[Array, "slots"], state: RowState, start: SlotStart
) -> tuple[Int32[Array, "slots"], RowState]:
    """The tokens and the state with a sequence's start in its slot: nothing of the slot's last sequence remains."""
    slot, fresh, token = start.slot, start.fresh, start.token

    def written(old: Array, new: ArrayLike) -> Array:
        return old.at[slot].set(jnp.where(fresh, new, old[slot]))

    counts = written(state.counts, 0).at[slot, start.completion].add(1, mode="drop")
    rest = map(written, state[1:], (start.prompt, start.banned, start.bias_ids, start.biases))
    return tokens.at[slot].set(token), RowState(counts, *rest)


class Report(NamedTuple):
    """What a step reports of its rows: the new ids, and the logprobs as `sample.Sampled` has them."""

    ids: Int32[Array, "B"]
    logprobs: Float32[Array, "B"]
    top_ids: Int32[Array, "B top"]
    top_logprobs: Float32[Array, "B top"]


def sample_slots(
    logits: Float32[Array, "B V"],
    tokens: Int32[Array, "slots"],
    state: RowState,
    step: Int32[ArrayLike, "B columns"],
    masks: Int32[ArrayLike, "B words"],
) -> tuple[Int32[Array, "slots"], RowState, Report]:
    """One token for each row, which becomes its slot's last token and is counted there.

    `step` is a packed `StepRows`; an option that no row of it uses takes no time.
    """
    logits = logits.astype(jnp.float32)
    rows = unpacked(step)
    adjusted, masked, reported = (flag.any() for flag in (rows.adjusted, rows.masked, rows.reported))
    scores = lax.cond(adjusted, _adjusted, lambda logits, *_: logits, logits, rows, state)
    drawn = (rows.sampling.temperature >= ALMOST_GREEDY).any()
    sampled = choose(logits, scores, rows.sampling, masks, drawn, masked, reported)
    report = Report(sampled.ids, sampled.logprobs, sampled.top_ids, sampled.top_logprobs)
    counts = state.counts.at[rows.slot, sampled.ids].add(1)
    return tokens.at[rows.slot].set(sampled.ids), state._replace(counts=counts), report


def _adjusted(logits: Array, rows: StepRows, state: RowState) -> Array:
    return adjusted_scores(logits, rows.sampling, _adjustments(rows, state, logits.shape[-1]))


def _adjustments(rows: StepRows, state: RowState, size: int) -> Adjustments:
    """The rows' changes, as the oracle computes them from the whole answer (share/generate.py: `adjustments`). Rows that ask for
    none have neutral parameters, so what their slots hold does not matter."""
    slots = rows.slot
    counts, num_rows = state.counts[slots].astype(jnp.int32), len(slots)
    at = jnp.arange(num_rows)[:, None], jnp.where(rows.adjusted[:, None], state.bias_ids[slots], size)
    bias = jnp.zeros((num_rows, size)).at[at].add(state.biases[slots], mode="drop")
    bias -= jnp.where(counts > 0, _penalty(counts, rows), 0)
    banned = bits_in(state.banned[slots], size) & rows.banned[:, None]
    repeated = bits_in(state.prompt[slots], size) | (counts > 0)
    return Adjustments(jnp.where(banned, -jnp.inf, bias), repeated)


def _penalty(counts: Int32[Array, "B V"], rows: StepRows) -> Float32[Array, "B V"]:
    """The penalty of every count: a rounded product, then a rounded sum."""
    product = rows.frequency_penalty[:, None] * counts.astype(jnp.float32)
    # A compiler may round a product and a sum only once, depending on the batch. No count is negative, which it cannot know:
    # the sign adds nothing to the product's bits, and keeps the two apart.
    bits = lax.bitcast_convert_type(product, jnp.int32) | (counts >> 31)
    return lax.bitcast_convert_type(bits, jnp.float32) + rows.presence_penalty[:, None]


def _padded(values: Sequence[int] | Sequence[float], size: int, dtype: type, padding: int) -> np.ndarray:
    array = np.full(size, padding, dtype)
    array[: len(values)] = values
    return array
