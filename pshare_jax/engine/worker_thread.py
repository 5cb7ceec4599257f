"""Worker threads: one thread steps all workers that share devices, so each pool belongs to exactly one thread.

In a turn every decode worker of the group runs a step and at most one prefill worker runs a chunk, so that a running
answer never waits for more than one chunk. Newly compiled programs have their slow first run when the engine is idle.
"""

import threading
import time
from collections.abc import Callable, Sequence

from pshare_jax.engine.decode_worker import DecodeWorker
from pshare_jax.engine.prefill_worker import PrefillWorker

POLL_SECONDS = 0.001
STALL_SECONDS = 60.0
"""A thread whose turn takes longer is stalled, which /health reports."""


class WorkerGroup:
    """Workers that share devices, stepped in turn."""

    def __init__(self, prefill: Sequence[PrefillWorker], decode: Sequence[DecodeWorker]):
        self.prefill, self.decode = prefill, decode
        self._next = 0

    @property
    def must_poll(self) -> bool:
        """Whether a worker may have something to do without a wake-up."""
        return any(worker.must_poll for worker in (*self.decode, *self.prefill))

    def step(self) -> bool:
        """One turn; False if there was nothing to do."""
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
        """Runs one compiled step that has not run yet; False if all have run."""
        return any(worker.warm_up() for worker in (*self.decode, *self.prefill))


class WorkerThread:
    """The thread that steps a group of workers, and warms up while `may_warm_up()`; if it dies, it calls `on_death`."""

    def __init__(self, group: WorkerGroup, on_death: Callable[[WorkerGroup], None], may_warm_up: Callable[[], bool]):
        self._group, self._on_death, self._may_warm_up = group, on_death, may_warm_up
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pshare-worker", daemon=True)
        self._started = False
        self._turn_began: float | None = None
        self.wake = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether the thread runs or was never started."""
        return not self._started or self._thread.is_alive()

    @property
    def stalled(self) -> bool:
        """Whether the current turn takes longer than `STALL_SECONDS`."""
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


def group_workers(
    prefill: Sequence[PrefillWorker], decode: Sequence[DecodeWorker], devices: list[set[int]]
) -> list[WorkerGroup]:
    """The workers, prefill before decode, in groups that share no device; `devices` has those of each worker."""
    first = len(prefill)
    return [
        WorkerGroup([prefill[i] for i in members if i < first], [decode[i - first] for i in members if i >= first])
        for members in group_by_devices(devices)
    ]


def group_by_devices(device_sets: list[set[int]]) -> list[list[int]]:
    """Indices of the workers that share a device, directly or through another worker, as one list per group."""
    groups: list[tuple[set[int], list[int]]] = []
    for index, devices in enumerate(device_sets):
        touching = [group for group in groups if group[0] & devices]
        merged_devices = devices.union(*(group[0] for group in touching))
        members = sorted([index, *(member for group in touching for member in group[1])])
        groups = [group for group in groups if group not in touching] + [(merged_devices, members)]
    return [members for _, members in groups]
