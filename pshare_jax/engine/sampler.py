"""Chooses the next token of every sequence of a decode step on the device (sampling/row_state.py), in one call.

Each decode worker has a sampler, and a `SamplerRows` for each group of sequences that decode together. What a row's scores
depend on besides the logits stays on the device: a step sends a few words a row, and the masks of grammars for batches
that have some.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from pshare_jax.engine.failures import RowFailed
from pshare_jax.engine.interfaces import Choice
from pshare_jax.engine.request import TokenLogprobs
from pshare_jax.engine.sequence import Sequence as Running
from pshare_jax.mesh import replicated
from pshare_jax.sampling.params import SamplingParams, all_allowed
from pshare_jax.sampling.row_state import Report, empty_state, sample_slots, slot_starts, start_slot
from pshare_jax.sampling.step_rows import ROW, packed, row_of
from pshare_jax.text.grammar import TokenMatcher


class Sampler:
    """Samples on the devices of `mesh` from logits `[B, vocab_size]`, for groups of at most `num_slots` sequences."""

    def __init__(self, mesh: Mesh, vocab_size: int, num_slots: int):
        self.mesh, self.vocab_size, self.num_slots = mesh, vocab_size, num_slots
        self.calls = _jitted(mesh)
        self._everything: dict[int, Any] = {}

    def new_rows(self, num_slots: int) -> "SamplerRows":
        """The rows of a group of at most `num_slots` sequences, all slots empty."""
        return SamplerRows(self, num_slots)

    def no_masks(self, num_rows: int) -> Any:
        """Masks on the device that allow everything, for a batch without grammars, which does not read them."""
        if num_rows not in self._everything:
            self._everything[num_rows] = self.on_device(all_allowed(num_rows, self.vocab_size))
        return self._everything[num_rows]

    def on_device(self, arrays: Any) -> Any:
        """The arrays on the sampler's devices."""
        # One placement for what is resident and what is not, or the call would be compiled a second time.
        return jax.device_put(arrays, replicated(self.mesh))

    def lower(self, num_rows: int) -> Any:
        """The call for this many rows, ready to be compiled."""
        logits = self._spec((num_rows, self.vocab_size), np.float32)
        return self.calls.sample.lower(
            logits, *self._state_specs(), packed(np.zeros(num_rows, ROW)), self.no_masks(num_rows)
        )

    def lower_join(self) -> Any:
        """The call that seats a sequence, ready to be compiled."""
        start = slot_starts(0, (0,), (), SamplingParams(), (), self.vocab_size)[0]
        return self.calls.start.lower(*self._state_specs(), start)

    def _state_specs(self) -> Any:
        arrays = jax.eval_shape(lambda: _empty(self.num_slots, self.vocab_size))
        return jax.tree.map(lambda array: self._spec(array.shape, array.dtype), arrays)

    def _spec(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self.mesh))


class SamplerRows:
    """The rows of one group, by slot: `num_slots` for sequences, and one more for padding rows.

    Used by the worker's thread alone. After a failed call, or a failed `Pending.fetch`, the arrays are lost: take new rows.
    """

    def __init__(self, sampler: Sampler, num_slots: int):
        self._sampler, self._num_slots = sampler, num_slots
        self.tokens, self._state = sampler.on_device(_empty(num_slots, sampler.vocab_size))
        """`tokens` `[num_slots + 1]`, on the device: the last token of each slot, the input of its next step."""
        self._rows = np.zeros(num_slots + 1, ROW)
        self._rows[:] = row_of(SamplingParams(), num_slots)
        # The first position for which a slot's banned ids are allowed.
        self._banned_until = np.zeros(num_slots + 1, np.int64)

    def join(self, slot: int, sequence: Running) -> None:
        """Seats a sequence in a slot, with the tokens that it has now; nothing of the slot's last sequence remains.

        Raises:
            RowFailed: its settings or history cannot be used.
        """
        request, size = sequence.request, self._sampler.vocab_size
        try:
            # A grammar decides about stop ids itself.
            banned = request.stop_ids if request.min_tokens and sequence.matcher is None else ()
            completion = sequence.decode.completion_ids
            starts = slot_starts(slot, request.prompt, completion, request.sampling, banned, size)
            row = row_of(request.sampling, slot, sequence.matcher is not None, request.logprobs is not None)
        except Exception as error:
            raise RowFailed(sequence) from error
        self._rows[slot] = row
        self._banned_until[slot] = len(request.prompt) + request.min_tokens if banned else 0
        for start in starts:
            self.tokens, self._state = self._sampler.calls.start(self.tokens, self._state, start)

    def prepare(
        self, batch: Sequence[Running], slots: Sequence[int], positions: Sequence[int], num_rows: int
    ) -> Callable[[Any], "Pending"]:
        """Does the host's part for a step of `num_rows` rows: the first are those of `batch`, seated in `slots`, whose new
        tokens have the absolute `positions`; the others are padding.

        Its result takes the logits `[num_rows, vocab_size]`, which may still be computed, and does not wait for them. It
        fills the masks of grammars, so their matchers must have all tokens of the sequence by then.
        """
        rows = self._rows[[*slots, *[self._num_slots] * (num_rows - len(slots))]]
        rows["position"][: len(slots)] = positions
        rows["banned"] = rows["position"] < self._banned_until[rows["slot"]]
        rows["adjusted"] |= rows["banned"]
        matchers = [sequence.matcher for sequence in batch] if rows["masked"].any() else []
        return functools.partial(self._choose, rows, matchers)

    def _choose(self, rows: np.ndarray, matchers: Sequence[TokenMatcher | None], logits: Any) -> "Pending":
        masks, failures = self._sampler.no_masks(len(rows)), {}
        if matchers:
            filled, failures = _filled(matchers, all_allowed(len(rows), self._sampler.vocab_size))
            masks = self._sampler.on_device(filled)
        self.tokens, self._state, report = self._sampler.calls.sample(
            logits, self.tokens, self._state, packed(rows), masks
        )
        return Pending(report, bool(rows["reported"].any()), failures)


class Pending:
    """The choice of a step that may still run."""

    def __init__(self, report: Report, reported: bool, failures: dict[int, Exception]):
        self._arrays: Any = report if reported else report[:1]
        self._failures = failures
        for array in self._arrays:
            array.copy_to_host_async()

    def fetch(self) -> Choice:
        """Waits for the step. The choice for a row whose grammar has failed raises."""
        return functools.partial(_chosen, jax.device_get(self._arrays), self._failures)


def _chosen(
    arrays: Sequence[np.ndarray], failures: dict[int, Exception], row: int, sequence: Running
) -> tuple[int, TokenLogprobs | None]:
    if row in failures:
        raise failures[row]
    token_id, wanted = int(arrays[0][row]), sequence.request.logprobs
    if wanted is None:
        return token_id, None
    logprob, top_ids, top_logprobs = (array[row] for array in arrays[1:])
    return token_id, TokenLogprobs.of(token_id, logprob, top_ids, top_logprobs, wanted)


def _filled(matchers: Sequence[TokenMatcher | None], masks: np.ndarray) -> tuple[np.ndarray, dict[int, Exception]]:
    """The masks of rows with a grammar, and why rows have none."""
    failures = {}
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            try:
                matcher.fill(masks[row])
            except Exception as error:
                failures[row] = error
    return masks, failures


class _Calls(NamedTuple):
    start: Any
    sample: Any


@functools.cache
def _jitted(mesh: Mesh) -> _Calls:
    placed = replicated(mesh)
    return _Calls(
        jax.jit(start_slot, donate_argnums=1, out_shardings=placed),
        jax.jit(sample_slots, donate_argnums=2, out_shardings=placed),
    )


def _empty(num_slots: int, vocab_size: int) -> Any:
    """The last tokens and the state of empty slots, with one for padding rows."""
    return np.zeros(num_slots + 1, np.int32), empty_state(num_slots + 1, vocab_size)
