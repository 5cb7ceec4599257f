"""The engine: takes requests, walks them over router and workers, and sends their tokens up.

The api calls `submit` and `abort`; a request goes down once (router, prefill, transfer, decode) and only events come
back. All books are kept under one lock; device work happens outside it, in the thread that owns the pool (owners.py).
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from pshare_jax.engine.admission import Admission
from pshare_jax.engine.decode_worker import DecodeWorker
from pshare_jax.engine.interfaces import EngineHooks, TokenSampler, Weights
from pshare_jax.engine.kv.keys import PageKey, page_keys
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.prefill_worker import PrefillWorker
from pshare_jax.engine.request import FAILED, LEGAL, TIMED_OUT, Event, Request, Sequence, State
from pshare_jax.engine.router import Policy, Route, Router, Ticket
from pshare_jax.engine.shapes import pages_for
from pshare_jax.engine.stop_strings import Pieces, TextOutput
from pshare_jax.engine.transfer import KVTransfer
from pshare_jax.engine.worker_thread import WorkerGroup, WorkerThread, group_by_devices
from pshare_jax.errors import PshareError
from pshare_jax.sampling.history import TokenHistory

logger = logging.getLogger(__name__)


class EngineFull(Exception):
    """As many requests as the engine may hold are waiting or running."""


class EngineDown(Exception):
    """A worker thread has died, or the engine is stopping."""


class UnknownTask(PshareError):
    """A request's task is not served, or not any more."""


@dataclass(frozen=True)
class PrefillSpec:
    """What a prefill worker is made of: weights, pool, device indices, and the tasks it takes (None: any)."""

    weights: Weights
    pool: Pool
    devices: Collection[int]
    tasks: Collection[str] | None = None


@dataclass(frozen=True)
class DecodeSpec:
    """What a decode worker is made of: its tasks' weights, pool, sampler and device indices."""

    tasks: dict[str, Weights]
    pool: Pool
    sampler: TokenSampler
    devices: Collection[int]


@dataclass(frozen=True)
class EngineSettings:
    """`key_of(task)` names the weights that make the task's prompt KV. Tokens of a prefill chunk and rows of a decode
    step are at most `chunk_tokens` and `max_rows`; a request without progress for `stall_seconds` is given up.
    """

    key_of: Callable[[str], str]
    vocab_size: int
    max_len: int
    page_bytes: int = 0
    chunk_tokens: int = 512
    max_rows: int = 16
    max_requests: int = 256
    stall_seconds: float = 300.0
    policy: Policy = "prefix"


class Engine:
    """All workers of a server and the requests in them."""

    def __init__(
        self,
        prefill: list[PrefillSpec],
        decode: list[DecodeSpec],
        detokenizer: Callable[[], Pieces],
        settings: EngineSettings,
    ):
        self.settings = settings
        self._prefill_sides = prefill
        self._detokenizer = detokenizer
        self.lock = threading.RLock()
        self._live: dict[str, Sequence] = {}
        self._accepting = True
        self.num_ended: dict[State, int] = {}
        self.on_end: list[Callable[[Sequence], None]] = []
        """All are told of every sequence that has ended, under the lock."""
        hooks = EngineHooks(self.lock, self.end, self._prefilled, self._pool_failed, self.wake)
        self.admission = Admission([side.pool for side in prefill], [side.pool for side in decode])
        self.page_size = decode[0].pool.page_size
        table_len = pages_for(settings.max_len, self.page_size)
        self.transfers = [KVTransfer(self.admission, i, hooks, settings.page_bytes) for i in range(len(decode))]
        self.prefill_workers = [
            PrefillWorker(i, side.weights, self.admission, self.transfers, hooks, settings.chunk_tokens, table_len)
            for i, side in enumerate(prefill)
        ]
        self.decode_workers = [
            DecodeWorker(
                i, side.tasks, self.admission, self.transfers[i], side.sampler, hooks, settings.max_rows, table_len
            )
            for i, side in enumerate(decode)
        ]
        self._router = Router(
            len(prefill),
            [list(side.tasks) for side in decode],
            settings.policy,
            self.page_size,
            None if prefill[0].tasks is None else [side.tasks or () for side in prefill],
        )
        self._groups = self._grouped([set(side.devices) for side in prefill], [set(side.devices) for side in decode])
        self._threads = [WorkerThread(group, self.fail_group, lambda: not self._live) for group in self._groups]
        self._watch = threading.Thread(target=self._run_watch, name="pshare-watch", daemon=True)
        self._stopped = threading.Event()

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: Request, on_event: Callable[[Event], None], route: Route | None = None) -> None:
        """Takes a request; `on_event` is called under the engine's lock, and must not raise or block.

        Args:
            request: its id must not be one that is still running, and its prompt and answer fit `settings.max_len`
                (the api refuses what does not).
            on_event: gets one event a token; the last one has `last` set.
            route: by default the router's choice.

        Raises:
            EngineFull: too many requests are waiting or running.
            EngineDown: a worker thread has died or the engine is stopping.
            UnknownTask: no decode worker has the request's task.
        """
        self._submit([self._sequence(request, on_event, self._keys(request))], route)

    def submit_all(self, requests: Items[Request], on_events: Items[Callable[[Event], None]]) -> None:
        """Takes all requests, or none of them; else like `submit`."""
        keys: dict[tuple[str, str, int, tuple[int, ...]], list[PageKey]] = {}
        sequences = []
        for request, on_event in zip(requests, on_events, strict=True):
            # The choices of one prompt share its keys, so that it is hashed once.
            named = request.task, request.cache_salt, request.base_len, request.prompt
            if named not in keys:
                keys[named] = self._keys(request)
            sequences.append(self._sequence(request, on_event, keys[named]))
        self._submit(sequences, None)

    def _keys(self, request: Request) -> list[PageKey]:
        fingerprint = self.settings.key_of(request.task)
        return page_keys(fingerprint, request.cache_salt, request.context, self.page_size)

    def _sequence(self, request: Request, on_event: Callable[[Event], None], keys: list[PageKey]) -> Sequence:
        history = TokenHistory(
            request.prompt, request.sampling, self.settings.vocab_size, request.stop_ids, request.min_tokens
        )
        return Sequence(request, TextOutput(self._detokenizer(), request.stop), history, keys, on_event)

    def _submit(self, sequences: list[Sequence], route: Route | None) -> None:
        with self.lock:
            if not self._accepting:
                raise EngineDown
            for sequence in sequences:
                if sequence.request.id in self._live:
                    raise ValueError(f"a request named {sequence.request.id} is still running")
                if not any(sequence.request.task in worker.tasks for worker in self.decode_workers):
                    raise UnknownTask(f"There is no task {sequence.request.task!r}.")
            if len(self._live) + len(sequences) > self.settings.max_requests:
                raise EngineFull
            for sequence in sequences:
                request = sequence.request
                ticket = self._assigned(sequence) if route is None else self._router.take(route, request.base_len)
                sequence.ticket = ticket
                sequence.prefill_worker, sequence.decode_worker = ticket.route.prefill, ticket.route.decode
                sequence.weights = self.decode_workers[sequence.decode_worker].tasks[request.task]
                self._live[request.id] = sequence
                self.admission.add(sequence)
        self.wake()

    def _assigned(self, sequence: Sequence) -> Ticket:
        request, pools = sequence.request, self.admission.prefill_pools
        return self._router.assign(
            request.task,
            request.session,
            request.base_len,
            sequence.keys,
            lambda worker: pools[worker].manager.num_hits(sequence.keys),
        )

    def put_task(self, name: str, weights: Mapping[int, Weights]) -> None:
        """Serves a task, by decode worker, to requests to come: a new one, or in the place of an old one; with no worker
        it is served no more. Requests that live end on the weights that they came for.
        """
        with self.lock:
            for worker in self.decode_workers:
                worker.put_task(name, weights.get(worker.index))
            self._router.decode_tasks = [list(worker.tasks) for worker in self.decode_workers]
        self.wake()

    def abort(self, request_id: str) -> None:
        """Ends a request at once; its pages come back within a step. Unknown and ended ids are ignored."""
        with self.lock:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self.end(sequence, State.ABORTED, Event(finish_reason="abort"))

    def stop_accepting(self) -> None:
        """Takes no more requests; those that live go on."""
        with self.lock:
            self._accepting = False

    def abort_all(self) -> None:
        """Takes no more requests and ends every live one."""
        with self.lock:
            self.stop_accepting()
            for sequence in list(self._live.values()):
                self.end(sequence, State.ABORTED, Event(finish_reason="abort"))

    def flush_cache(self) -> int:
        """Forgets all prompt KV that no live request holds; how many pages came free."""
        with self.lock:
            return sum(pool.manager.flush() for pool in self.pools)

    def end(self, sequence: Sequence, state: State, event: Event) -> None:
        """Ends a sequence, once, from any thread; the worker that has it gives its pages back."""
        with self.lock:
            if sequence.final:
                return
            if state is not State.FINISHED:
                made = len(sequence.completion_ids)
                event = replace(event, completion_tokens=made, cached_tokens=sequence.cached_tokens)
            sequence.move(state)
            self.num_ended[state] = self.num_ended.get(state, 0) + 1
            self.admission.take_out(sequence)
            del self._live[sequence.request.id]
            self._router.release(sequence.ticket)
            sequence.on_event(event)
            for told in self.on_end:
                try:
                    told(sequence)
                except Exception:
                    # Who counts must not be able to end a worker.
                    logger.exception("the end of request %s could not be noted", sequence.request.id)
        self.wake()

    def all_routes(self) -> list[tuple[Route, str]]:
        """Routes that together use every task of every decode worker and every prefill worker, each with its task."""
        pairs = [(decode, task) for decode, tasks in enumerate(self._router.decode_tasks) for task in tasks]
        routes = []
        for turn in range(max(len(pairs), len(self._prefill_sides))):
            decode, task = pairs[turn % len(pairs)]
            able = [i for i, side in enumerate(self._prefill_sides) if side.tasks is None or task in side.tasks]
            routes.append((Route(able[turn % len(able)], decode), task))
        return routes

    @property
    def workers(self) -> list[PrefillWorker | DecodeWorker]:
        """All workers."""
        return [*self.prefill_workers, *self.decode_workers]

    @property
    def pools(self) -> list[Pool]:
        """Every pool once."""
        return list({id(pool): pool for pool in (*self.admission.prefill_pools, *self.admission.decode_pools)}.values())

    @property
    def num_in_state(self) -> dict[State, int]:
        """Requests waiting or running, by state."""
        counts = Counter(sequence.state for sequence in self.live)
        return {state: counts[state] for state in LEGAL if LEGAL[state]}

    @property
    def live(self) -> list[Sequence]:
        """The sequences that wait or run, the first that came first."""
        with self.lock:
            return list(self._live.values())

    @property
    def num_live(self) -> int:
        """Requests waiting or running."""
        return len(self._live)

    @property
    def idle(self) -> bool:
        """Whether no request lives and no worker has anything left to give back."""
        admission = self.admission
        groups = (*admission.prefilling, *admission.arriving, *admission.decoding, *admission.in_flight)
        return not self._live and not any(groups)

    # --- steps and threads ----------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn of every group of workers (without threads); False if none had anything to do."""
        self.expire()
        done = [group.step() for group in self._groups]
        return any(done)

    def start(self) -> None:
        """Gives every group of workers its thread."""
        for thread in self._threads:
            thread.start()
        self._watch.start()

    def stop(self) -> None:
        """Ends all requests and the threads."""
        self.abort_all()
        self._stopped.set()
        for thread in self._threads:
            thread.stop()

    def wake(self) -> None:
        """Makes every worker look for something to do."""
        for thread in self._threads:
            thread.wake.set()

    @property
    def warm(self) -> bool:
        """Whether every step that is compiled has had its first run."""
        return all(worker.next_cold is None for worker in self.workers)

    @property
    def accepting(self) -> bool:
        """Whether requests are taken."""
        return self._accepting

    @property
    def healthy(self) -> bool:
        """Whether requests are taken, every worker's thread lives and none has been in one step for too long."""
        return self._accepting and all(thread.alive and not thread.stalled for thread in self._threads)

    def expire(self) -> None:
        """Gives up the requests, and cancels the adopted transfers, that made no progress for too long."""
        limit = time.monotonic() - self.settings.stall_seconds
        with self.lock:
            for sequence in [one for one in self._live.values() if one.progressed < limit]:
                self.end(sequence, State.FAILED, Event(error=TIMED_OUT))
            self.admission.cancel_adopted(limit)

    def fail_group(self, group: WorkerGroup) -> None:
        """The thread that stepped these workers is dead: their requests fail and no new ones are taken."""
        with self.lock:
            self._accepting = False
            for sequence in list(self._live.values()):
                prefill = self.prefill_workers[sequence.prefill_worker]
                before = sequence.state in (State.WAITING, State.PREFILLING, State.PREEMPTED)
                if (before and prefill in group.prefill) or self.decode_workers[sequence.decode_worker] in group.decode:
                    self.end(sequence, State.FAILED, Event(error=FAILED))
            # Their thread is gone: somebody must give back what they hold on living workers' pools.
            for worker in group.prefill:
                self.admission.reap_prefill(worker.index)
            for worker in group.decode:
                self.admission.reap_decode(worker.index)
        self.wake()

    def _prefilled(self, sequence: Sequence) -> None:
        done = sequence.num_prefilled >= sequence.context_len
        self._router.prefilled(sequence.ticket, sequence.request.base_len if done else sequence.num_prefilled)

    def _pool_failed(self, pool: Pool) -> None:
        """A step of the pool has failed: who has pages in it fails, all else goes on with an empty pool."""
        with self.lock:
            for sequence in self.admission.holders(pool):
                self.end(sequence, State.FAILED, Event(error=FAILED))
            pool.rebuild()
            self.admission.room_changed()

    def _run_watch(self) -> None:
        while not self._stopped.wait(0.5):
            self.expire()

    def _grouped(self, prefill: Items[set[int]], decode: Items[set[int]]) -> list[WorkerGroup]:
        num_prefill = len(prefill)
        groups = []
        for members in group_by_devices([*prefill, *decode]):
            groups.append(
                WorkerGroup(
                    [self.prefill_workers[i] for i in members if i < num_prefill],
                    [self.decode_workers[i - num_prefill] for i in members if i >= num_prefill],
                )
            )
        return groups
