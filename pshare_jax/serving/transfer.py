"""Moves a finished prefill's KV to a decode worker's devices: one device_put, counted in bytes and seconds.

There is one `KVTransfer` per decode worker. A prefill worker's thread calls `send` between its steps and goes on; the
decode worker's thread takes a sequence only when all its arrays are there, so that no decode step ever
waits for a prefill.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax

from pshare_jax.serving.request import Sequence, State


@runtime_checkable
class Destination(Protocol):
    """Where the KV goes: the decode modules of one worker."""

    def place(self, kv: Any) -> Any:
        """The KV on the worker's devices (dispatched, perhaps not there yet)."""
        ...


@dataclass
class TransferStats:
    """Copies that arrived: how many, their bytes, and seconds from dispatch to seen ready."""

    count: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class KVTransfer:
    """The way to one decode worker; at most `max_waiting` sequences' KV are on it or waiting at its end.

    `wake` is called when a sequence enters or leaves, since the owner at the other end may be asleep.
    """

    def __init__(self, destination: Destination, wake: Callable[[], None], max_waiting: int = 2):
        self._destination = destination
        self._wake = wake
        self._max_waiting = max_waiting
        self._sent: queue.SimpleQueue[Sequence] = queue.SimpleQueue()
        self._waiting: list[Sequence] = []
        self.stats = TransferStats()
        self._lock = threading.Lock()
        self.closed = False

    def has_room(self) -> bool:
        """Whether one more sequence may be prefilled for this worker (a closed way takes it, to refuse it)."""
        return self.closed or self._sent.qsize() + len(self._waiting) < self._max_waiting

    @property
    def in_flight(self) -> int:
        """Sequences sent and not yet taken by the decode worker."""
        return self._sent.qsize() + len(self._waiting)

    def send(self, sequence: Sequence) -> None:
        """Dispatches the copy of the sequence's KV (called by the owner of the prefill side).

        Raises:
            RuntimeError: the decode worker is dead.
        """
        sequence.kv = self._destination.place(sequence.kv)
        # Under the lock, so that a worker that dies meanwhile either finds the sequence on its way or refuses it.
        with self._lock:
            if self.closed:
                raise RuntimeError("the decode worker of this task has stopped")
            sequence.move(State.TRANSFERRING)
            self._sent.put(sequence)
        self._wake()

    def close(self) -> None:
        """The decode worker is dead: nothing more is taken (any thread)."""
        with self._lock:
            self.closed = True

    def take_aborted(self) -> list[Sequence]:
        """The sequences on the way that are no longer wanted (called by the decode worker's owner)."""
        while not self._sent.empty():
            self._waiting.append(self._sent.get())
        aborted = [sequence for sequence in self._waiting if sequence.abort_requested.is_set()]
        for sequence in aborted:
            self._waiting.remove(sequence)
        return aborted

    def take_arrived(self) -> Sequence | None:
        """The first sequence whose KV is all there (called by the decode worker's owner)."""
        for sequence in self._waiting:
            if all(leaf.is_ready() for leaf in jax.tree.leaves(sequence.kv.layers)):
                self._waiting.remove(sequence)
                self._count(sequence)
                self._wake()
                return sequence
        return None

    def _count(self, sequence: Sequence) -> None:
        self.stats.count += 1
        self.stats.num_bytes += sequence.kv.nbytes
        self.stats.seconds += time.monotonic() - sequence.entered[State.TRANSFERRING]
