"""Worker threads: one thread steps all workers that share devices, so each pool belongs to exactly one thread.

In a turn every decode worker of the group runs a step and at most one prefill worker runs a chunk, so that a running
answer never waits for more than one chunk. Newly compiled programs have their slow first run when the engine is idle. When
workers fail beyond a step, their thread restarts them.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from pshare_jax.engine.decode_worker import DecodeWorker
from pshare_jax.engine.prefill_worker import PrefillWorker

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.001
STALL_SECONDS = 60.0
"""A thread whose turn takes longer is stalled, which /health reports."""
STOP_SECONDS = 10.0
RESTART_SECONDS = (0.0, 1.0, 5.0, 20.0)
"""Pauses before the restarts of a group of workers that dies again and again; then it stays dead."""
FORGIVE_SECONDS = 60.0
"""After so many seconds without a death the pauses begin anew."""


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
    """The thread that steps a group of workers, and warms up while `may_warm_up()`.

    When a step raises, the group is dead: `on_death(group, for_good)` is called, and after a pause from `RESTART_SECONDS`
    `on_restart(group)` and the steps go on. A group that dies again and again stays dead, or if `on_death` says so.
    """

    def __init__(
        self,
        group: WorkerGroup,
        on_death: Callable[[WorkerGroup, bool], bool],
        on_restart: Callable[[WorkerGroup], None],
        may_warm_up: Callable[[], bool],
    ):
        self._group, self._on_death, self._on_restart, self._may_warm_up = group, on_death, on_restart, may_warm_up
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pshare-worker", daemon=True)
        self._started = False
        self._dead = False
        self._turn_began: float | None = None
        self.wake = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether the thread steps its workers, or was never started."""
        return not self._started or (self._thread.is_alive() and not self._dead)

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
        """Ends the thread after its current turn; a thread that is stuck in it is left behind."""
        self._stopping.set()
        self.wake.set()
        if self._started:
            self._thread.join(STOP_SECONDS)
            if self._thread.is_alive():
                logger.error("a worker thread did not end within %.0f seconds and is left behind", STOP_SECONDS)

    def _run(self) -> None:
        deaths = 0
        while True:
            began = time.monotonic()
            try:
                self._serve()
                return
            except BaseException:
                logger.exception("a worker thread failed")
            self._dead, self._turn_began = True, None
            deaths = 0 if time.monotonic() - began > FORGIVE_SECONDS else deaths
            try:
                for_good = self._on_death(self._group, deaths == len(RESTART_SECONDS))
            except BaseException:
                logger.exception("the requests of a failed worker could not be queued again; it stays dead")
                for_good = True
            if for_good or self._stopping.wait(RESTART_SECONDS[deaths]):
                return
            deaths += 1
            self._dead = False
            self._on_restart(self._group)

    def _serve(self) -> None:
        while not self._stopping.is_set():
            self.wake.clear()
            self._turn_began = time.monotonic()
            done = self._group.step() or (self._may_warm_up() and self._group.warm_up())
            self._turn_began = None
            if not done:
                self.wake.wait(POLL_SECONDS if self._group.must_poll else None)


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
