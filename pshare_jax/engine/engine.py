"""The engine: accepts requests, routes them to workers, and reports their tokens as events.

All state is read and written under one lock; device work happens outside it, in the thread that owns the pool
(worker_thread.py). Without `start` the engine has no threads: the thread that waits for a result steps it.
"""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any

from pshare_jax.engine.admission import Admission
from pshare_jax.engine.config import EngineConfig, resolved
from pshare_jax.engine.decode_worker import DecodeWorker
from pshare_jax.engine.handle import EngineFull, Handle, Result, run_all
from pshare_jax.engine.interfaces import DecodeSpec, EngineHooks, ModelFacts, Module, PrefillSpec
from pshare_jax.engine.kv.keys import PageKey
from pshare_jax.engine.kv.known_keys import KnownKeys
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.kv.sessions import Caller
from pshare_jax.engine.prefill_worker import PrefillWorker
from pshare_jax.engine.recovery import Recovery
from pshare_jax.engine.request import TIMED_OUT, Event, Request, check_request
from pshare_jax.engine.router import Route, Router
from pshare_jax.engine.sequence import LEGAL, Sequence, State
from pshare_jax.engine.shapes import pages_for
from pshare_jax.engine.transfer import KVTransfer
from pshare_jax.engine.worker_thread import POLL_SECONDS, WorkerThread, group_workers
from pshare_jax.errors import PshareError
from pshare_jax.sampling.params import GREEDY, SamplingParams
from pshare_jax.share.boundary import Boundary, Split
from pshare_jax.text.grammar import Grammar, TokenMatcher
from pshare_jax.text.stop_strings import TextOutput

logger = logging.getLogger(__name__)
_numbers = itertools.count()


class EngineDown(PshareError):
    """The engine is stopping, or all workers of a request's task are dead."""


class UnknownTask(PshareError):
    """A request's task is not served, or no longer served."""


class Engine:
    """All workers of one model with its tasks, and the requests in them."""

    def __init__(self, prefill: list[PrefillSpec], decode: list[DecodeSpec], facts: ModelFacts, config: EngineConfig):
        self.prefill_specs, self.decode_specs, self.facts, self.config = prefill, decode, facts, config
        self.lock = threading.RLock()
        self.tasks = list(config.tasks)
        """Names of the served tasks, in the config's order; tasks added later follow."""
        self._live: dict[str, Sequence] = {}
        self._accepting = True
        self._started = False
        self._stepping = threading.Lock()
        self.num_ended: dict[State, int] = {}
        self.on_admitted: list[Callable[[Sequence], None]] = []
        """Called with every sequence at its first admission, under the lock; an exception is logged."""
        self.on_first_token: list[Callable[[Sequence], None]] = []
        """Likewise, at its first generated token."""
        self.on_end: list[Callable[[Sequence], None]] = []
        """Likewise, when it has ended."""
        admitted, first_token = partial(_call, self.on_admitted), partial(_call, self.on_first_token)
        self._recovery = Recovery(self)
        failed = self._recovery.step_failed
        hooks = EngineHooks(self.lock, admitted, first_token, self.end, self._prefilled, failed, self.wake)
        self.admission = Admission(
            [spec.pool for spec in prefill],
            [spec.pool for spec in decode],
            resolved(config.batch.decode_rows),
            self.chunk_tokens,
        )
        self.page_size = decode[0].pool.page_size
        self._known_keys = KnownKeys(self.page_size)
        table_len = pages_for(facts.max_len, self.page_size)
        self.transfers = [KVTransfer(self.admission, i, hooks, facts.page_bytes) for i in range(len(decode))]
        self.prefill_workers = [
            PrefillWorker(i, spec.weights, self.admission, self.transfers, hooks, self.chunk_tokens, table_len)
            for i, spec in enumerate(prefill)
        ]
        self.decode_workers = [
            DecodeWorker(
                i, spec.tasks, self.admission, self.transfers[i], spec.sampler, hooks, table_len, config.batch.pipelined
            )
            for i, spec in enumerate(decode)
        ]
        prefill_tasks = None if prefill[0].tasks is None else [spec.tasks or () for spec in prefill]
        decode_tasks = [list(spec.tasks) for spec in decode]
        self.router = Router(len(prefill), decode_tasks, config.routing, self.page_size, prefill_tasks)
        devices = [set(spec.devices) for spec in (*prefill, *decode)]
        self._groups = group_workers(self.prefill_workers, self.decode_workers, devices)
        died, restarted = self._recovery.group_died, self._recovery.group_restarted
        self._threads = [WorkerThread(group, died, restarted, lambda: not self._live) for group in self._groups]
        self._watch = threading.Thread(target=self._run_watch, name="pshare-watch", daemon=True)
        self._stopped = threading.Event()

    @classmethod
    def build(
        cls,
        model: Any,
        config: EngineConfig,
        report: Callable[[str], None] = lambda line: None,
        reload: Callable[[Any, Any], Any] | None = None,
    ) -> "Engine":
        """An engine for a loaded model (`pshare_jax.load`), with weights and pools on the devices in the config.

        It is not started: `generate`, `run` and handles step it in the calling thread until `start` gives it threads.
        `report` is called with a line of progress for each task and a table of the devices' memory. With `reload` (build.py)
        the engine does not keep the parts of the model that no worker uses.

        Raises:
            PshareError: the config, the placement or a task does not fit the model.
        """
        from pshare_jax.engine.build import build_engine

        return build_engine(model, config, report, reload)

    # --- offline generation ---------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Items[Items[int]],
        task: str,
        sampling: SamplingParams = GREEDY,
        *,
        max_tokens: int,
        stop: tuple[str, ...] = (),
        stop_ids: Iterable[int] | None = None,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> list[Result]:
        """One task's answers to prompts of token ids, in order; `stop_ids` defaults to the model's end tokens.

        Raises:
            PshareError: a prompt is empty or too long, the task is unknown, the grammar cannot be used, or a request has
                failed.
        """
        ends = self.facts.stop_ids if stop_ids is None else frozenset(stop_ids)
        number = next(_numbers)
        fields = {"stop": stop, "stop_ids": ends, "logprobs": logprobs, "grammar": grammar}
        return self.run(
            Request(f"generate-{number}-{index}", task, tuple(prompt), max_tokens, sampling, **fields)
            for index, prompt in enumerate(prompts)
        )

    def run(self, requests: Iterable[Request], progress: Callable[[int], None] | None = None) -> list[Result]:
        """The results of requests of any tasks, in order, at most `limits.max_requests` at a time.

        `progress` is called with 1, 2, ... as requests end.

        Raises:
            PshareError: a request does not fit the model, its task is unknown, or it has failed; the others are cancelled.
        """
        return run_all(self, requests, self._advance, progress)

    def _advance(self) -> None:
        """Runs a step; waits shortly if it did nothing, or if the steps are run by the engine's threads or another caller."""
        done = False
        if not self._started and self._stepping.acquire(blocking=False):
            try:
                done = self._step_workers()
            finally:
                self._stepping.release()
        if not done:
            time.sleep(POLL_SECONDS)

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(
        self, request: Request, on_event: Callable[[Event], None] | None = None, route: Route | None = None
    ) -> Handle:
        """Accepts a request that fits the model (`check_request`); its id must differ from those of all live requests.

        Args:
            request: what `check_request` allows.
            on_event: receives the events instead of the handle, under the engine's lock; it must not raise or block.
            route: by default the router's choice.

        Raises:
            PshareError: the request does not fit the model, or its grammar cannot be used.
            EngineFull: too many requests are waiting or running.
            EngineDown: the engine is stopping, or all workers of the task are dead.
            RequestBanned: the same request has made a device step fail before.
            UnknownTask: no decode worker has the request's task.
        """
        return self.submit_all([request], [on_event], route)[0]

    def submit_all(
        self, requests: Items[Request], on_events: Items[Callable[[Event], None] | None], route: Route | None = None
    ) -> list[Handle]:
        """Accepts all requests or none of them; otherwise as `submit`."""
        while True:
            boundaries = self._boundaries(requests)
            handles = self._handles(requests, on_events, boundaries)
            with self.lock:
                if boundaries != self._boundaries(requests):
                    # A task was replaced by a module with another boundary meanwhile.
                    continue
                self._check_acceptable(requests)
                for sequence in (handle.sequence for handle in handles):
                    self.route(sequence, route)
                    self._live[sequence.request.id] = sequence
                    self.admission.add(sequence)
            self.wake()
            return handles

    def _boundaries(self, requests: Items[Request]) -> dict[str, Boundary]:
        """The boundary of each served task of the requests."""
        return {task: self.boundary(task) for task in {request.task for request in requests}}

    def boundary(self, task: str) -> Boundary:
        """Where the task's module divides prompts; the default if the task is not served."""
        modules = (worker.tasks[task] for worker in self.decode_workers if task in worker.tasks)
        return next((module.boundary for module in modules), Boundary())

    def _handles(
        self,
        requests: Items[Request],
        on_events: Items[Callable[[Event], None] | None],
        boundaries: Mapping[str, Boundary],
    ) -> list[Handle]:
        known: dict[tuple[Any, ...], tuple[Split, list[PageKey], Caller]] = {}
        handles = []
        for request, on_event in zip(requests, on_events, strict=True):
            # All choices of one prompt share its check and its keys: its tokens and names are read once.
            hashed = (request.task, request.cache_salt, request.response_start, request.max_tokens, id(request.prompt))
            hashed += (request.session, request.hint)
            if hashed not in known:
                check_request(request, self.facts.vocab_size, self.facts.max_len)
                self._recovery.bans.check(request)
                caller = self._caller(request)
                known[hashed] = (*self._split(request, boundaries[request.task], caller), caller)
            sequence = self._sequence(request, *known[hashed])
            handles.append(Handle(sequence, self._advance, self.abort, on_event))
        return handles

    def _split(self, request: Request, boundary: Boundary, caller: Caller) -> tuple[Split, list[PageKey]]:
        """The request's split, and the keys of the full pages that the base encodes."""
        split = boundary.split(request.prompt, request.response_start)
        context, key = request.prompt[: split.base_len], self.facts.key_of(request.task)
        return split, self._known_keys.keys(caller.session, key, request.cache_salt, context)

    def _sequence(self, request: Request, split: Split, keys: list[PageKey], caller: Caller) -> Sequence:
        matcher = None if request.grammar is None else self._matcher(request, request.grammar)
        request.sampling.check_vocabulary(self.facts.vocab_size)
        output = TextOutput(self.facts.detokenizer(), request.stop)
        return Sequence(request, output, keys, split, matcher=matcher, caller=caller)

    def _matcher(self, request: Request, grammar: Grammar) -> TokenMatcher:
        if self.facts.grammars is None:
            raise PshareError("This engine was built without grammars; leave the request's grammar out.")
        begun = () if request.response_start is None else request.prompt[request.response_start :]
        return self.facts.grammars.matcher(grammar, request.stop_ids, request.min_tokens, begun)

    def _caller(self, request: Request) -> Caller:
        """Sessions of other tenants, and those whose KV comes from other weights, are others.

        Pools and router remember many sessions and clients choose the names, of any length, so only hashes are kept.
        """
        weights = self.facts.key_of(request.task)
        names = [
            sha256(repr((weights, request.cache_salt, name)).encode()).digest() if name else None
            for name in (request.session, request.parent)
        ]
        return Caller(*names, prefetch=request.prefetches)

    def _check_acceptable(self, requests: Items[Request]) -> None:
        if not self._accepting:
            raise EngineDown("The engine is stopping.")
        for request in requests:
            if request.id in self._live:
                raise ValueError(f"a request with the id {request.id} is still running")
            if not any(request.task in worker.tasks for worker in self.decode_workers):
                raise UnknownTask(f"There is no task {request.task!r}; the tasks are {', '.join(self.tasks)}.")
            if not self._recovery.has_workers(request.task):
                raise EngineDown(f"The workers of the task {request.task!r} are dead.")
        limit = resolved(self.config.limits.max_requests)
        if len(self._live) + len(requests) > limit:
            raise EngineFull(f"The engine is at its limit of {limit} concurrent requests; retry shortly.")

    def route(self, sequence: Sequence, route: Route | None) -> None:
        """Gives a sequence its workers (by default the router's choice) and its module; called under the lock."""
        request, keys, admission = sequence.request, sequence.keys, self.admission
        if route is not None:
            sequence.ticket = self.router.take(route, sequence.split.base_len)
        else:
            sequence.ticket = self.router.assign(
                request.task,
                sequence.caller.session,
                sequence.split.base_len,
                keys,
                lambda i: admission.prefill_pools[i].manager.num_hits(keys),
                lambda i: admission.decode_pools[i].manager.num_hits(keys),
                sequence.caller.parent,
            )
        sequence.decode.module = self.decode_workers[sequence.decode_worker].tasks[request.task]

    def modules_in_use(self, worker: int) -> list[Module]:
        """The modules of a decode worker's tasks and live requests."""
        with self.lock:
            live = [sequence.decode.module for sequence in self._live.values() if sequence.decode_worker == worker]
            return [*self.decode_workers[worker].tasks.values(), *live]

    def put_task(self, name: str, modules: Mapping[int, Module]) -> None:
        """Adds or replaces a task with modules by decode worker; without modules the task is removed.

        Live requests keep the module that they were submitted for.
        """
        with self.lock:
            for index, worker in enumerate(self.decode_workers):
                worker.put_task(name, modules.get(index))
                # The spec must not keep the old weights alive.
                self.decode_specs[index] = replace(self.decode_specs[index], tasks=dict(worker.tasks))
            self.router.decode_tasks = [list(worker.tasks) for worker in self.decode_workers]
            if modules and name not in self.tasks:
                self.tasks.append(name)
            elif not modules and name in self.tasks:
                self.tasks.remove(name)
        self.wake()

    def abort(self, request_id: str) -> None:
        """Ends a request at once; its pages are released within a step. Unknown and ended ids are ignored."""
        with self.lock:
            sequence = self._live.get(request_id)
            if sequence is not None:
                self.end(sequence, State.ABORTED, Event(finish_reason="abort"))

    def stop_accepting(self) -> None:
        """Refuses new requests; live requests continue."""
        with self.lock:
            self._accepting = False

    def abort_all(self) -> None:
        """Refuses new requests and ends all live requests."""
        with self.lock:
            self.stop_accepting()
            for sequence in self.live:
                self.end(sequence, State.ABORTED, Event(finish_reason="abort"))

    def flush_cache(self) -> int:
        """Drops all unreferenced pages from the prefix caches and returns their number."""
        with self.lock:
            return sum(pool.manager.flush() for pool in self.pools)

    def end(self, sequence: Sequence, state: State, event: Event) -> None:
        """Ends a sequence once, from any thread; its worker releases its pages."""
        with self.lock:
            if sequence.final:
                return
            if state is not State.FINISHED:
                generated = len(sequence.decode.completion_ids)
                event = replace(event, completion_tokens=generated, cached_tokens=sequence.cached_tokens)
            sequence.move(state)
            self.num_ended[state] = self.num_ended.get(state, 0) + 1
            self.admission.take_out(sequence)
            del self._live[sequence.request.id]
            self.router.release(sequence.ticket)
            try:
                sequence.on_event(event)
            except Exception:
                # It has ended all the same, and the caller may be a worker's thread.
                logger.exception("the last event of request %s could not be reported", sequence.request.id)
            _call(self.on_end, sequence)
        self.wake()

    @property
    def chunk_tokens(self) -> int:
        """The most tokens of one prefill step."""
        return min(resolved(self.config.batch.prefill_tokens), self.facts.max_len)

    @property
    def workers(self) -> list[PrefillWorker | DecodeWorker]:
        """All workers."""
        return [*self.prefill_workers, *self.decode_workers]

    @property
    def pools(self) -> list[Pool]:
        """All pools, each once."""
        return self.admission.pools

    @property
    def num_in_state(self) -> dict[State, int]:
        """Requests waiting or running, by state."""
        counts = Counter(sequence.state for sequence in self.live)
        return {state: counts[state] for state in LEGAL if LEGAL[state]}

    @property
    def live(self) -> list[Sequence]:
        """The waiting and running sequences, in order of arrival."""
        with self.lock:
            return list(self._live.values())

    @property
    def num_live(self) -> int:
        """Requests waiting or running."""
        return len(self._live)

    @property
    def idle(self) -> bool:
        """Whether no request is live and all workers have released everything."""
        admission = self.admission
        groups = (*admission.prefilling, *admission.arriving, *admission.decoding, *admission.in_flight)
        return not self._live and not any(groups)

    # --- steps and threads ----------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn of every group of workers (without threads); False if none had anything to do."""
        self.expire()
        return self._step_workers()

    def _step_workers(self) -> bool:
        # Without `expire`: a caller that pauses between two handles must not find its requests given up.
        done = [group.step() for group in self._groups]
        return any(done)

    def start(self) -> None:
        """Gives every group of workers its thread."""
        self._started = True
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
        """Wakes all worker threads."""
        for thread in self._threads:
            thread.wake.set()

    @property
    def warm(self) -> bool:
        """Whether every compiled step has had its first run."""
        return all(worker.next_cold is None for worker in self.workers)

    @property
    def accepting(self) -> bool:
        """Whether new requests are accepted."""
        return self._accepting

    @property
    def healthy(self) -> bool:
        """Whether new requests are accepted, every worker thread is alive and not stalled, and deadlines are watched."""
        watched = not self._started or self._watch.is_alive()
        return self._accepting and watched and all(thread.alive and not thread.stalled for thread in self._threads)

    @property
    def broken(self) -> bool:
        """Whether a task can no longer be served, since all its workers are dead for good."""
        with self.lock:
            return not all(self._recovery.has_workers(task) for task in self.tasks)

    def expire(self) -> None:
        """Fails requests that have made no progress for `limits.stall_seconds` while nothing ahead of them moved either, and
        cancels adopted transfers as old as that.
        """
        limit = time.monotonic() - self.config.limits.stall_seconds
        with self.lock:
            late = self.admission.late(self.live, limit)
            # Who waits for pages of a late sequence will be queued again, and may produce them itself.
            for sequence in [sequence for sequence in late if not self.admission.waits_for(sequence, late)]:
                self.end(
                    sequence, State.FAILED, Event(error=TIMED_OUT, retry=True if sequence.admitted is None else None)
                )
            self.admission.cancel_adopted(limit)
            self._recovery.move_from_dead_workers()

    def _prefilled(self, sequence: Sequence) -> None:
        done = sequence.prefill.done
        self.router.prefilled(sequence.ticket, sequence.split.base_len if done else sequence.prefill.num_prefilled)

    def _run_watch(self) -> None:
        while not self._stopped.wait(0.5):
            try:
                self.expire()
            except Exception:
                logger.exception("deadlines could not be checked; they are checked again shortly")


def _call(callbacks: Iterable[Callable[[Sequence], None]], sequence: Sequence) -> None:
    for callback in callbacks:
        try:
            callback(sequence)
        except Exception:
            # An error in a metric must not end a worker's thread.
            logger.exception("a callback failed for request %s", sequence.request.id)
