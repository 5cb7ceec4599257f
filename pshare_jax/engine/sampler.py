"""Chooses the next token of every sequence of a decode step on the device (sampling/sample.py), in one call.

Each decode worker has a sampler. Token histories (penalties, bias, bans) are kept on the host and copied to the device
only for batches that need them, as are the masks of grammars.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from pshare_jax.engine.failures import RowFailed
from pshare_jax.engine.interfaces import Choice
from pshare_jax.engine.request import TokenLogprobs
from pshare_jax.engine.sequence import Sequence as Running
from pshare_jax.mesh import replicated
from pshare_jax.sampling.params import all_allowed, sampling_rows
from pshare_jax.sampling.sample import Adjustments, sample_rows
from pshare_jax.text.grammar import TokenMatcher


class Sampler:
    """Samples on the devices of `mesh` from logits `[B, vocab_size]`."""

    def __init__(self, mesh: Mesh, vocab_size: int):
        self._mesh, self._vocab_size = mesh, vocab_size
        self._sample = _jitted(mesh)
        self._nothing: dict[int, Adjustments] = {}
        self._everything: dict[int, Any] = {}

    def prepare(self, batch: Sequence[Running], num_rows: int) -> Callable[[Any], Choice]:
        """Does the host's part for a step of `num_rows` rows; its result takes the logits `[num_rows, vocab_size]`, which may
        still be computed: grammars' masks are filled meanwhile. The choice for a row whose grammar has failed raises.

        Raises:
            RowFailed: for the sequence whose history cannot be used.
        """
        settings = [sequence.request.sampling for sequence in batch]
        rows = sampling_rows(settings, [sequence.num_tokens for sequence in batch], num_rows)
        adjusted = any(sequence.history.active for sequence in batch)
        reported = any(sequence.request.logprobs is not None for sequence in batch)
        drawn = any(not sampling.is_greedy for sampling in settings)
        adjustments = self._adjustments(batch, num_rows) if adjusted else self.no_adjustments(num_rows)
        matchers = [sequence.matcher for sequence in batch]
        flags = drawn, adjusted, any(matcher is not None for matcher in matchers), reported
        return functools.partial(self._choose, rows, adjustments, matchers, flags)

    def _choose(
        self,
        rows: Any,
        adjustments: Adjustments,
        matchers: Sequence[TokenMatcher | None],
        flags: tuple[bool, bool, bool, bool],
        logits: Any,
    ) -> Choice:
        masks, failures = self.no_masks(len(logits)), {}
        if flags[2]:
            masks, failures = self._masks(matchers, len(logits))
        sampled = self._sample(logits, rows, adjustments, masks, *map(np.array, flags))
        ids = np.asarray(sampled.ids).tolist()
        if not flags[3]:
            return functools.partial(_without_logprobs, ids, failures)
        return functools.partial(_with_logprobs, ids, failures, *map(np.asarray, sampled[2:]))

    def no_masks(self, num_rows: int) -> Any:
        """Masks on the device that allow everything, for a batch without grammars, which does not read them."""
        if num_rows not in self._everything:
            self._everything[num_rows] = self._on_device(all_allowed(num_rows, self._vocab_size))
        return self._everything[num_rows]

    def _masks(self, matchers: Sequence[TokenMatcher | None], num_rows: int) -> tuple[Any, dict[int, Exception]]:
        """The rows' masks on the device, and why rows have none."""
        masks, failures = all_allowed(num_rows, self._vocab_size), {}
        for row, matcher in enumerate(matchers):
            if matcher is not None:
                try:
                    matcher.fill(masks[row])
                except Exception as error:
                    failures[row] = error
        return self._on_device(masks), failures

    def no_adjustments(self, num_rows: int) -> Adjustments:
        """Zeros on the device, for a batch without adjustments, which does not read them."""
        if num_rows not in self._nothing:
            shape = num_rows, self._vocab_size
            self._nothing[num_rows] = self._placed(np.zeros(shape, np.float32), np.zeros(shape, bool))
        return self._nothing[num_rows]

    def lower(self, num_rows: int) -> Any:
        """The call for this many rows, ready to be compiled."""
        rows = sampling_rows([], [], num_rows)
        logits = jax.ShapeDtypeStruct((num_rows, self._vocab_size), np.float32, sharding=replicated(self._mesh))
        flag = np.array(False)
        given = self.no_adjustments(num_rows), self.no_masks(num_rows)
        return self._sample.lower(logits, rows, *given, flag, flag, flag, flag)

    def _adjustments(self, batch: Sequence[Running], num_rows: int) -> Adjustments:
        bias = np.zeros((num_rows, self._vocab_size), np.float32)
        repeated = np.zeros((num_rows, self._vocab_size), bool)
        for row, sequence in enumerate(batch):
            if sequence.history.active:
                try:
                    sequence.history.write(bias[row], repeated[row])
                except Exception as error:
                    raise RowFailed(sequence) from error
        return self._placed(bias, repeated)

    def _placed(self, bias: np.ndarray, repeated: np.ndarray) -> Adjustments:
        return self._on_device(Adjustments(bias, repeated))

    def _on_device(self, arrays: Any) -> Any:
        # One placement for what is resident and what is not, or the call would be compiled a second time.
        return jax.device_put(arrays, replicated(self._mesh))


@functools.cache
def _jitted(mesh: Mesh) -> Any:
    return jax.jit(sample_rows, out_shardings=replicated(mesh))


def _without_logprobs(
    ids: list[int], failures: dict[int, Exception], row: int, sequence: Running
) -> tuple[int, TokenLogprobs | None]:
    if row in failures:
        raise failures[row]
    return ids[row], None


def _with_logprobs(
    ids: list[int],
    failures: dict[int, Exception],
    logprobs: np.ndarray,
    top_ids: np.ndarray,
    top_logprobs: np.ndarray,
    row: int,
    sequence: Running,
) -> tuple[int, TokenLogprobs | None]:
    wanted = sequence.request.logprobs
    if wanted is None or row in failures:
        return _without_logprobs(ids, failures, row, sequence)
    return ids[row], TokenLogprobs.of(ids[row], logprobs[row], top_ids[row], top_logprobs[row], wanted)
