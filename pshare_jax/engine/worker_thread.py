"""Which workers are stepped by which thread: one thread for all workers that share devices, one owner for each pool.

A turn gives every decode worker of the group a step and lets at most one prefill worker run a chunk, so that a running
answer never waits for more than one chunk. Programs that were compiled meanwhile have their slow first run when no
request is in the engine.
"""

import threading
import time
from collections.abc import Callable, Sequence

from pshare_jax.engine.decode_worker import DecodeWorker
from pshare_jax.engine.prefill_worker import PrefillWorker

POLL_SECONDS = 0.001
STALL_SECONDS = 60.0
"""A thread that is in one turn for so long is stalled; /health then says so."""


class WorkerGroup:
    """Workers that share devices, stepped in turn."""

    def __init__(self, prefill: Sequence[PrefillWorker], decode: Sequence[DecodeWorker]):
        self.prefill, self.decode = prefill, decode
        self._next = 0

    @property
    def must_poll(self) -> bool:
        """Whether something can become possible without a wake-up."""
        return any(worker.must_poll for worker in (*self.decode, *self.prefill))

    def step(self) -> bool:
        """One turn; False if no worker had anything to do."""
        done = [worker.step() for worker in self.decode]
        for offset in range(len(self.prefill)):
            worker = self.prefill[(self._next + offset) % len(self.prefill)]
            calls = worker.stats.calls
            done.append(worker.step())
            if worker.stats.calls > calls:
                self._next = (self._next + offset + 1) % len(self.prefill)
                break
        return any(done)

    def warm_up(self) -> bool:
        """The first run of one program that is compiled; False if all have run."""
        return any(worker.warm_up() for worker in (*self.decode, *self.prefill))


class WorkerThread:
    """The one thread that steps a group of workers; `on_death` is called if it dies. It warms up when `may_warm_up` allows it."""

    def __init__(self, group: WorkerGroup, on_death: Callable[[WorkerGroup], None], may_warm_up: Callable[[], bool]):
        self._group, self._on_death, self._may_warm_up = group, on_death, may_warm_up
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pshare-worker", daemon=True)
        self._started = False
        self._turn_began: float | None = None
        self.wake = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether the thread runs (or was never asked to)."""
        return not self._started or self._thread.is_alive()

    @property
    def stalled(self) -> bool:
        """Whether the current turn takes far too long."""
        began = self._turn_began
        return began is not None and time.monotonic() - began > STALL_SECONDS

    def start(self) -> None:
        """Starts the thread."""
        self._started = True
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current turn."""
        self._stopping = True
        self.wake.set()
        if self._started:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.wake.clear()
                self._turn_began = time.monotonic()
                done = self._group.step() or (self._may_warm_up() and self._group.warm_up())
                self._turn_began = None
                if not done:
                    self.wake.wait(POLL_SECONDS if self._group.must_poll else None)
        except BaseException:
            self._on_death(self._group)
            raise


def group_by_devices(device_sets: list[set[int]]) -> list[list[int]]:
    """Indices of the workers that (directly or through another) share a device, one list a group."""
    groups: list[tuple[set[int], list[int]]] = []
    for index, devices in enumerate(device_sets):
        touching = [group for group in groups if group[0] & devices]
        merged_devices = devices.union(*(group[0] for group in touching))
        members = sorted([index, *(member for group in touching for member in group[1])])
        groups = [group for group in groups if group not in touching] + [(merged_devices, members)]
    return [members for _, members in groups]
