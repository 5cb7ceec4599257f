"""What becomes of requests when a step, a pool or a worker fails; failures.py says which request is guilty.

No fault reaches further than it must: requests that lose their KV are queued again, and the base encodes their prompts
again while scoring steps repeat what their decode module had consumed, so that nothing is shown twice.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from pshare_jax.engine.decode_worker import DecodeWorker
from pshare_jax.engine.failures import MAX_ACCUSED, MOVES, Bans, StepFailed, StepWatch, WorkerBroken
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.prefill_worker import PrefillWorker
from pshare_jax.engine.request import FAILED, Event
from pshare_jax.engine.router import Kind
from pshare_jax.engine.sequence import Sequence, State
from pshare_jax.engine.worker_thread import WorkerGroup

if TYPE_CHECKING:
    from pshare_jax.engine.engine import Engine

logger = logging.getLogger(__name__)


class Recovery:
    """The failures of one engine: `bans` are requests that it refuses, `gone` are workers that are dead for good."""

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self.bans = Bans()
        self.gone: set[PrefillWorker | DecodeWorker] = set()

    def step_failed(self, pool: Pool, watch: StepWatch, failure: StepFailed, works: Callable[[], bool]) -> None:
        """A step on the pool has failed, and its content is lost: only a guilty request fails, the others with pages there
        are queued again. Called by the pool's thread; no request is guilty where a step on padding (`works`) fails, too.

        Raises:
            WorkerBroken: such a step fails.
        """
        engine = self._engine
        with engine.lock:
            # A step over arrays that a dispatched step has failed to write fails with it.
            others = [(worker.watch, worker.failed_step()) for worker in engine.workers if worker.pool is pool]
            failures = [(watch, failure), *((other, first) for other, first in others if first is not None)]
            watch, failure = min(failures, key=lambda one: one[1].order)
            guilty, in_doubt = watch.failed(failure), watch.must_prove()
            for sequence in engine.admission.holders(pool):
                sequence.must_restart = True
            pool.rebuild()
            engine.admission.room_changed()
        if (guilty or in_doubt) and not works():
            with engine.lock:
                watch.acquit()
            raise WorkerBroken("A worker cannot run a step on its devices any more; the log says why.")
        for sequence in guilty:
            logger.error("request %s made a %s step fail again, alone", sequence.request.id, failure.kind)
            sequence.num_accused += 1
            if failure.kind in MOVES:
                engine.end(sequence, State.FAILED, Event(error=FAILED))
            elif sequence.num_accused == MAX_ACCUSED:
                self._convict(sequence)
        engine.wake()

    def _convict(self, guilty: Sequence) -> None:
        """Fails a guilty request and those like it that have not begun to answer, such as other choices of its call."""
        engine = self._engine
        with engine.lock:
            self.bans.add(guilty.request)
            alike = [s for s in engine.live if not s.decode.completion_ids and self.bans.includes(s.request)]
            for sequence in {guilty, *alike}:
                engine.end(sequence, State.FAILED, Event(error=FAILED, retry=False))

    def group_died(self, group: WorkerGroup, for_good: bool) -> bool:
        """The thread of these workers has failed: their requests are queued again, for other workers if it stays dead, and
        new requests avoid them. Called by that thread; returns whether it stays dead, as it must without a new pool.
        """
        engine, admission = self._engine, self._engine.admission
        with engine.lock:
            workers = [*group.prefill, *group.decode]
            self._tell_router(group, engine.router.leave_out)
            pools = list({id(worker.pool): worker.pool for worker in workers}.values())
            # Sequences with nothing to prefill hold pages of other pools alone.
            held = [one for pool in pools for one in admission.holders(pool)]
            held += [one for worker in group.prefill for one in admission.prefilling[worker.index]]
            for sequence in dict.fromkeys(held):
                for_good |= not self._put_aside(sequence)
            for pool in pools:
                try:
                    pool.rebuild()
                except Exception:
                    logger.exception("%s could not be rebuilt", pool.name)
                    for_good = True
            for worker in group.decode:
                # No other thread does it, and transfers to a rebuilt pool hold pages of living prefill pools.
                admission.drop_cancelled(worker.index)
            # They cannot be admitted now, and must not keep younger sequences of living workers waiting.
            queued = {sequence for worker in group.prefill for sequence in admission.waiting[worker.index]}
            for refused in admission.refused:
                refused -= queued
            admission.room_changed()
            if for_good:
                self.gone.update(workers)
                self._tell_router(group, engine.router.remove)
                self.move_from_dead_workers()
        engine.wake()
        return for_good

    def _put_aside(self, sequence: Sequence) -> bool:
        """Queues a sequence of a dead worker again; False if its books are broken, perhaps the cause of the death: it fails."""
        try:
            self._engine.admission.put_aside(sequence)
            return True
        except Exception:
            logger.exception("the pages of request %s could not be released", sequence.request.id)
            self._engine.end(sequence, State.FAILED, Event(error=FAILED, retry=True))
            return False

    def group_restarted(self, group: WorkerGroup) -> None:
        """The thread steps these workers again."""
        with self._engine.lock:
            self._tell_router(group, self._engine.router.bring_back)
            self._engine.admission.room_changed()
        self._engine.wake()

    def has_workers(self, task: str) -> bool:
        """Whether workers that are not dead for good serve the task."""
        if not self.gone:
            return True
        engine = self._engine
        prefill = [engine.prefill_specs[w.index].tasks for w in engine.prefill_workers if w not in self.gone]
        decode = [worker for worker in engine.decode_workers if worker not in self.gone]
        return any(own is None or task in own for own in prefill) and any(task in worker.tasks for worker in decode)

    def move_from_dead_workers(self) -> None:
        """Queues what waits for a worker that is dead for good at other workers, if they serve its task; else it fails."""
        engine = self._engine
        for sequence in engine.live if self.gone else []:
            decode = engine.decode_workers[sequence.decode_worker]
            queued = sequence.state in (State.WAITING, State.PREEMPTED)
            if not queued or self.gone.isdisjoint((engine.prefill_workers[sequence.prefill_worker], decode)):
                continue
            task = sequence.request.task
            # A task that was replaced meanwhile has other weights elsewhere.
            if not self.has_workers(task) or decode.tasks.get(task) is not sequence.decode.module:
                engine.end(sequence, State.FAILED, Event(error=FAILED, retry=True))
                continue
            engine.admission.take_out(sequence)
            engine.router.release(sequence.ticket)
            engine.route(sequence, None)
            engine.admission.add(sequence)

    def _tell_router(self, group: WorkerGroup, change: Callable[[Kind, int], None]) -> None:
        for worker in group.prefill:
            change("prefill", worker.index)
        for worker in group.decode:
            change("decode", worker.index)
