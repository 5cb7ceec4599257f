"""The engine: takes requests, walks them over router and workers, and sends their tokens up. Owns the threads.

The api calls `submit` and `abort`; a request goes down once (router, prefill, transfer, decode) and only events come
back. In the server every group of workers that share devices has one thread; tests call `step` instead.
"""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pshare_jax.serving.decode import Decoder, DecodeWorker
from pshare_jax.serving.output import Pieces, TextOutput
from pshare_jax.serving.prefill import Prefiller, PrefillWorker
from pshare_jax.serving.request import FAILED, Event, Request, Sequence, State
from pshare_jax.serving.router import Router
from pshare_jax.serving.transfer import Destination, KVTransfer

POLL_SECONDS = 0.001


class EngineFull(Exception):
    """As many requests as the engine may hold are waiting or running."""


class EngineDown(Exception):
    """A worker thread has died, or the engine is stopping."""


@runtime_checkable
class DecodeModules(Decoder, Destination, Protocol):
    """A decode worker's modules: they decode, and KV can be placed on their devices."""


@dataclass(frozen=True)
class PrefillSide:
    """What a prefill worker is made of: the base on its mesh, and its device indices."""

    module: Prefiller
    devices: Collection[int]


@dataclass(frozen=True)
class DecodeSide:
    """What a decode worker is made of: its modules, its device indices and the tasks it serves."""

    modules: DecodeModules
    devices: Collection[int]
    tasks: Collection[str]


class Engine:
    """All workers of a server and the requests in them."""

    def __init__(
        self,
        prefill: list[PrefillSide],
        decode: list[DecodeSide],
        detokenizer: Callable[[], Pieces],
        max_requests: int = 256,
    ):
        self._detokenizer = detokenizer
        self._max_requests = max_requests
        self._router = Router(len(prefill), [side.tasks for side in decode])
        self.transfers = [KVTransfer(side.modules, self._wake) for side in decode]
        self.prefill_workers = [PrefillWorker(side.module, self.transfers, self._end) for side in prefill]
        self.decode_workers = [
            DecodeWorker(side.modules, transfer, self._emit, self._end)
            for side, transfer in zip(decode, self.transfers, strict=True)
        ]
        self._workers: list[PrefillWorker | DecodeWorker] = [*self.prefill_workers, *self.decode_workers]
        groups = group_by_devices([set(side.devices) for side in [*prefill, *decode]])
        self._owners = [_Owner(self, [self._workers[i] for i in group]) for group in groups]
        self._lock = threading.Lock()
        self._live: dict[str, Sequence] = {}
        self._accepting = True

    def submit(self, request: Request, on_event: Callable[[Event], None], route: tuple[int, int] | None = None) -> None:
        """Takes a request; `on_event` is called from a worker's thread, and must not raise or block.

        Args:
            request: its id must not be one that is still running.
            on_event: gets one event a token; the last one has `last` set.
            route: (prefill worker, decode worker), by default the router's choice.

        Raises:
            EngineFull: too many requests are waiting or running.
            EngineDown: a worker thread has died or the engine is stopping.
        """
        sequence = Sequence(request, TextOutput(self._detokenizer(), request.stop), on_event)
        with self._lock:
            if not self._accepting:
                raise EngineDown
            if len(self._live) >= self._max_requests:
                raise EngineFull
            chosen = self._router.take(*route) if route else self._router.assign(request.task)
            sequence.prefill_worker, sequence.decode_worker = chosen
            self._live[request.id] = sequence
        self.prefill_workers[sequence.prefill_worker].submit(sequence)
        self._wake()

    def all_routes(self) -> list[tuple[tuple[int, int], str]]:
        """Routes that together use every task of every decode worker and every prefill worker, each with its task."""
        pairs = [(decode, task) for decode, tasks in enumerate(self._router.decode_tasks) for task in tasks]
        num_prefill = len(self.prefill_workers)
        return [
            ((i % num_prefill, pairs[i % len(pairs)][0]), pairs[i % len(pairs)][1])
            for i in range(max(len(pairs), num_prefill))
        ]

    def abort(self, request_id: str) -> None:
        """Asks for a request's end; its owner sees it within a step. Unknown and ended ids are ignored."""
        with self._lock:
            sequence = self._live.get(request_id)
        if sequence is not None:
            sequence.abort_requested.set()
            self._wake()

    def abort_all(self) -> None:
        """Takes no more requests and asks for the end of every live one."""
        with self._lock:
            self._accepting = False
            live = list(self._live.values())
        for sequence in live:
            sequence.abort_requested.set()
        self._wake()

    def step(self) -> bool:
        """Steps every worker once in turn (without threads); False if none had anything to do."""
        return step_all(self._workers)

    def start(self) -> None:
        """Gives every group of workers its thread."""
        for owner in self._owners:
            owner.start()

    def stop(self) -> None:
        """Ends the threads; requests that still live get a last `abort` event."""
        self.abort_all()
        for owner in self._owners:
            owner.stop()
        with self._lock:
            live = list(self._live.values())
        for sequence in live:
            self._end(sequence, State.ABORTED, Event(finish_reason="abort"))

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and every worker's thread lives."""
        return self._accepting and all(owner.alive for owner in self._owners)

    @property
    def num_live(self) -> int:
        """Requests waiting or running."""
        return len(self._live)

    def fail_workers(self, workers: Collection[object]) -> None:
        """The thread that stepped these workers is dead: their requests fail and no new ones are taken."""
        dead = [worker in workers for worker in self.decode_workers]
        with self._lock:
            self._accepting = False
            for transfer, is_dead in zip(self.transfers, dead, strict=True):
                if is_dead:
                    transfer.close()
            live = list(self._live.values())
        for sequence in live:
            before = sequence.state in (State.WAITING, State.PREFILLING)
            owner = self.prefill_workers[sequence.prefill_worker]
            if owner in workers if before else dead[sequence.decode_worker]:
                self._end(sequence, State.FAILED, Event(error=FAILED))
        self._wake()

    def _emit(self, sequence: Sequence, token_id: int) -> Event:
        """A token came up: the event for it, already sent unless it is the last one (then `_end` sends it)."""
        event = sequence.accept(token_id)
        if not event.last:
            sequence.on_event(event)
        return event

    def _end(self, sequence: Sequence, state: State, event: Event) -> None:
        with self._lock:
            if self._live.pop(sequence.request.id, None) is None:
                return
            self._router.release(sequence.prefill_worker, sequence.decode_worker)
        sequence.move(state)
        sequence.on_event(event)
        self._wake()

    def _wake(self) -> None:
        for owner in self._owners:
            owner.wake.set()


class _Owner:
    """The one thread that steps a group of workers in turn."""

    def __init__(self, engine: Engine, workers: list[PrefillWorker | DecodeWorker]):
        self._engine = engine
        self._workers = workers
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="pshare-worker", daemon=True)
        self.wake = threading.Event()
        self._started = False

    @property
    def alive(self) -> bool:
        """Whether the thread runs (or was never asked to)."""
        return not self._started or self._thread.is_alive()

    def start(self) -> None:
        """Starts the thread."""
        self._started = True
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self._stopping = True
        self.wake.set()
        if self._started:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.wake.clear()
                if not step_all(self._workers):
                    self.wake.wait(POLL_SECONDS if any(worker.must_poll for worker in self._workers) else None)
        except BaseException:
            self._engine.fail_workers(self._workers)
            raise


def step_all(workers: list[PrefillWorker | DecodeWorker]) -> bool:
    """One step of each worker (also of those after one that did something); False if none had anything to do."""
    done = [worker.step() for worker in workers]
    return any(done)


def group_by_devices(device_sets: list[set[int]]) -> list[list[int]]:
    """Indices of the workers that (directly or through another) share a device, one list a group."""
    groups: list[tuple[set[int], list[int]]] = []
    for index, devices in enumerate(device_sets):
        touching = [group for group in groups if group[0] & devices]
        merged_devices = devices.union(*(group[0] for group in touching))
        members = sorted([index, *(member for group in touching for member in group[1])])
        groups = [group for group in groups if group not in touching] + [(merged_devices, members)]
    return [members for _, members in groups]
