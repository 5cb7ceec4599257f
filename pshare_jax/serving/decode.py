"""The decode worker: generates for its tasks from transferred base KV, one request at a time.

Whoever owns the worker calls `step`, which takes an arrived sequence or runs one decode step of the current one. The
first input is the last prompt token, so the first answer token already comes from the task's own weights.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from pshare_jax.sampling import SamplingParams, sample
from pshare_jax.serving.request import FAILED, End, Event, Request, Sequence, State
from pshare_jax.serving.transfer import KVTransfer

logger = logging.getLogger(__name__)


@runtime_checkable
class Decoder(Protocol):
    """The decode modules of one mesh (pshare_jax.share.DecodeModules)."""

    def decode(self, task: str, tokens: np.ndarray, kv: Any, *, donate: bool = False) -> tuple[jax.Array, Any]:
        """Logits [1, T, V] of tokens [1, T] after `kv`, and the grown KV."""
        ...


class DecodeWorker:
    """Runs one sequence to its end, then takes the next whose KV has arrived."""

    def __init__(self, modules: Decoder, transfer: KVTransfer, emit: Callable[[Sequence, int], Event], end: End):
        self._modules = modules
        self._transfer = transfer
        self._emit = emit
        self._end = end
        self._current: Sequence | None = None

    @property
    def must_poll(self) -> bool:
        """Whether a transfer under way can become ready without a wake-up."""
        return self._current is None and self._transfer.in_flight > 0

    def step(self) -> bool:
        """Takes a sequence or makes one token; False if there was nothing to do."""
        for aborted in self._transfer.take_aborted():
            self._end(aborted, State.ABORTED, Event(finish_reason="abort"))
        if self._current is None:
            self._current = self._transfer.take_arrived()
        sequence = self._current
        if sequence is None:
            return False
        try:
            if self._advance(sequence):
                self._current = None
        except Exception:
            logger.exception("the decoding of request %s failed", sequence.request.id)
            self._current = None
            self._end(sequence, State.FAILED, Event(error=FAILED))
        return True

    def _advance(self, sequence: Sequence) -> bool:
        """One token; True when the sequence has ended."""
        if sequence.abort_requested.is_set():
            self._end(sequence, State.ABORTED, Event(finish_reason="abort"))
            return True
        if sequence.state is State.TRANSFERRING:
            sequence.move(State.DECODING)
        event = self._emit(sequence, self._next_token(sequence))
        if not event.last:
            return False
        self._end(sequence, State.FINISHED, event)
        return True

    def _next_token(self, sequence: Sequence) -> int:
        request = sequence.request
        token = sequence.completion_ids[-1] if sequence.completion_ids else request.prompt[-1]
        tokens = np.asarray([[token]], np.int32)
        # The KV is this sequence's alone, so its memory may be written in place.
        logits, sequence.kv = self._modules.decode(request.task, tokens, sequence.kv, donate=True)
        position = len(request.prompt) + len(sequence.completion_ids)
        token_id, _ = sample(logits[0, -1], sampling_params(request), position)
        return int(token_id)


def sampling_params(request: Request) -> SamplingParams:
    """The request's sampling fields as the sampler takes them."""
    return SamplingParams(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        seed=request.seed,
    )
