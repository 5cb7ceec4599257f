"""The prefill worker: turns prompts into KV with the shared base, one request at a time, and never samples.

The engine submits sequences from any thread; whoever owns the worker calls `step`, which runs one chunk of one prompt
and, after the last chunk, sends the KV to the sequence's decode worker.
"""

import logging
import queue
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from pshare_jax.serving.request import FAILED, End, Event, Sequence, State
from pshare_jax.serving.transfer import KVTransfer

logger = logging.getLogger(__name__)


@runtime_checkable
class Prefiller(Protocol):
    """The base on one mesh (pshare_jax.share.PrefillModule)."""

    def prefill(self, tokens: np.ndarray, kv: Any = None) -> Any:
        """KV of tokens [1, T] after those already in `kv`; T may be 0."""
        ...


class PrefillWorker:
    """Prefills `prompt[:-1]` in chunks; the last prompt token belongs to the decode module."""

    def __init__(self, module: Prefiller, transfers: list[KVTransfer], end: End, chunk_len: int = 512):
        self._module = module
        self._transfers = transfers
        self._end = end
        self._chunk_len = chunk_len
        self._inbox: queue.SimpleQueue[Sequence] = queue.SimpleQueue()
        self._waiting: list[Sequence] = []
        self._current: Sequence | None = None

    def submit(self, sequence: Sequence) -> None:
        """Queues a waiting sequence (any thread)."""
        self._inbox.put(sequence)

    @property
    def must_poll(self) -> bool:
        """Whether something can become ready without a wake-up: never here."""
        return False

    def step(self) -> bool:
        """Advances one sequence by one chunk; False if there was nothing to do."""
        self._drop_aborted()
        if self._current is None:
            self._current = self._next()
        sequence = self._current
        if sequence is None:
            return False
        try:
            if self._advance(sequence):
                self._current = None
        except Exception:
            logger.exception("the prefill of request %s failed", sequence.request.id)
            self._current = None
            self._end(sequence, State.FAILED, Event(error=FAILED))
        return True

    def _drop_aborted(self) -> None:
        while not self._inbox.empty():
            self._waiting.append(self._inbox.get())
        for sequence in [s for s in self._waiting if s.abort_requested.is_set()]:
            self._waiting.remove(sequence)
            self._end(sequence, State.ABORTED, Event(finish_reason="abort"))

    def _next(self) -> Sequence | None:
        """The first waiting sequence whose decode worker has room."""
        for sequence in self._waiting:
            if self._transfers[sequence.decode_worker].has_room():
                self._waiting.remove(sequence)
                sequence.move(State.PREFILLING)
                return sequence
        return None

    def _advance(self, sequence: Sequence) -> bool:
        """One chunk; True when the sequence has left this worker."""
        # Waiting for the chunk before keeps one chunk in flight, so that an abort frees the device within a chunk.
        if sequence.kv is not None:
            jax.block_until_ready(sequence.kv.layers)
        if sequence.abort_requested.is_set():
            self._end(sequence, State.ABORTED, Event(finish_reason="abort"))
            return True
        context = sequence.request.prompt[:-1]
        chunk = context[sequence.num_prefilled : sequence.num_prefilled + self._chunk_len]
        sequence.kv = self._module.prefill(np.asarray([chunk], np.int32), sequence.kv)
        sequence.num_prefilled += len(chunk)
        if sequence.num_prefilled < len(context):
            return False
        self._transfers[sequence.decode_worker].send(sequence)
        return True
