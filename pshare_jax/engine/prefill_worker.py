"""The prefill worker: computes KV pages of contexts with the base, chunk by chunk, and never samples.

The worker's thread calls `step`: at most one chunk (schedule.py says of which sequence), or one of a few short sequences, is
dispatched; full pages are published at once and sent to the decode worker, so that the transfer overlaps the next chunk.
"""

import itertools
import logging
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from pshare_jax.engine.admission import Admission
from pshare_jax.engine.failures import NOT_DISPATCHED, StepFailed, StepWatch
from pshare_jax.engine.interfaces import EngineHooks, Weights
from pshare_jax.engine.schedule import PrefillTurns
from pshare_jax.engine.sequence import PageTransfer, Sequence
from pshare_jax.engine.shapes import CompiledShapes, choose_rows, padded_batch, prefill_shapes
from pshare_jax.engine.transfer import KVTransfer, write_arrived
from pshare_jax.model.paged_batch import PagedBatch

logger = logging.getLogger(__name__)
MAX_RUNNING = 2
"""Dispatched chunks: one that runs and one that is ready to follow."""


@dataclass
class PrefillStats:
    """Prefill steps so far: calls, real tokens, and token slots of the calls (the rest is padding)."""

    calls: int = 0
    tokens: int = 0
    slots: int = 0


class PrefillSpeed:
    """Tokens and seconds of finished steps, by size within a factor of two. Used under the engine's lock."""

    def __init__(self) -> None:
        self._tokens: defaultdict[int, int] = defaultdict(int)
        self._seconds: defaultdict[int, float] = defaultdict(float)

    def add(self, steps: list[int], seconds: float) -> None:
        """Adds finished steps, with their numbers of tokens, that ran one after another in `seconds`."""
        for num_tokens in steps:
            size = num_tokens.bit_length()
            self._tokens[size] += num_tokens
            self._seconds[size] += seconds * num_tokens / sum(steps)

    @property
    def seconds(self) -> float:
        """Seconds during which a step ran."""
        return sum(self._seconds.values(), 0.0)

    @property
    def best(self) -> float | None:
        """Tokens per second at the fastest size; None before any step has finished."""
        rates = (self._tokens[size] / seconds for size, seconds in self._seconds.items() if seconds > 0)
        return max(rates, default=None)


class _Chunk:
    """The next tokens of a sequence, and the pages that it has when they are chosen."""

    def __init__(self, sequence: Sequence, num_tokens: int):
        held = sequence.prefill.table
        assert held is not None
        self.sequence, self.held, self.table_pages = sequence, held, list(held.pages)
        self.start, self.end = sequence.prefill.num_prefilled, sequence.prefill.num_prefilled + num_tokens
        self.tokens = sequence.request.prompt[self.start : self.end]


@dataclass(frozen=True)
class _Batch:
    """A step's shape (rows, tokens) and its chunks."""

    shape: tuple[int, int]
    chunks: list[_Chunk]

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


@dataclass
class _Step:
    """A dispatched step; `done` is ready when it has run."""

    done: Any
    batch: _Batch
    order: int = NOT_DISPATCHED

    def failure(self, error: Exception) -> StepFailed:
        places = [(chunk.sequence, chunk.start) for chunk in self.batch.chunks]
        return StepFailed("prefill", places, error, self.batch.shape, self.order)


class PrefillWorker:
    """Prefills the contexts of the sequences routed to it."""

    def __init__(
        self,
        index: int,
        weights: Weights,
        admission: Admission,
        transfers: list[KVTransfer],
        hooks: EngineHooks,
        chunk_tokens: int,
        table_len: int,
    ):
        """`transfers` are those to each decode worker."""
        self.index, self.pool = index, admission.prefill_pools[index]
        self._weights, self._admission, self._transfers, self._hooks = weights, admission, transfers, hooks
        self._chunk_tokens, self._table_len, self._turns = chunk_tokens, table_len, PrefillTurns(chunk_tokens)
        self._running: deque[_Step] = deque()
        self._busy_since = 0.0
        self._generation = self.pool.generation
        self.stats = PrefillStats()
        self.speed = PrefillSpeed()
        self.compiled = CompiledShapes(prefill_shapes(chunk_tokens))
        self.watch = StepWatch(self.compiled)
        self._ran: set[tuple[int, int]] = set()

    @property
    def must_poll(self) -> bool:
        """Whether the worker may have something to do without a wake-up: a chunk ends, or transfers have room again."""
        return bool(self._running) or bool(self._admission.prefilling[self.index])

    def step(self) -> bool:
        """Admits, sends what can be sent and runs one chunk; False if there was nothing to do."""
        try:
            self._check_running()
            with self._hooks.lock:
                done = self._admission.reap_prefill(self.index)
                admitted = self._admission.admit(self.index)
                for sequence in admitted:
                    self._hooks.prefilled(sequence)
                    if sequence.admitted == sequence.progressed:
                        self._hooks.admitted(sequence)
            if done or admitted:
                # Pages were released, or a full decode pool's priority has moved: workers that wait for it may be asleep.
                self._hooks.wake()
            done = self._receive_returned() or done
            done = self._send() or done
            batch = self._choose()
            if batch is not None:
                self._run(batch)
                self._send()
            with self._hooks.lock:
                return self._leave() or batch is not None or done
        except StepFailed as failure:
            logger.exception("a %s step of %s failed", failure.kind, self.pool.name)
            self._hooks.step_failed(self.pool, self.watch, failure, self._works)
            return True

    @property
    def next_cold(self) -> tuple[int, int] | None:
        """The shape of a compiled step that has not run yet."""
        compiled = [shape for shape in prefill_shapes(self._chunk_tokens) if self.compiled.knows(shape)]
        return next((shape for shape in compiled if shape not in self._ran), None)

    def warm_up(self) -> bool:
        """Runs such a step on padding alone, since a first run is slow; False if there is none."""
        if (shape := self.next_cold) is None:
            return False
        try:
            self._call(*padded_batch(shape, self._table_len)).block_until_ready()
        except Exception as error:
            logger.exception("the first %s step of %s failed", shape, self.pool.name)
            self.compiled.give_up(shape)
            self._hooks.step_failed(self.pool, self.watch, StepFailed("warm-up", [], error), lambda: True)
        return True

    def _works(self) -> bool:
        """Whether a step on padding alone succeeds."""
        shape = next(shape for shape in prefill_shapes(self._chunk_tokens) if shape in self.compiled)
        try:
            self._call(*padded_batch(shape, self._table_len)).block_until_ready()
        except Exception:
            logger.exception("a prefill step on padding failed in %s", self.pool.name)
            return False
        return True

    def _call(self, tokens: np.ndarray, rows: PagedBatch) -> Any:
        num_rows, bucket = tokens.shape
        self._ran.add((num_rows, bucket))
        weights = self._weights.current
        return self.pool.run(weights.paged.prefill, weights.params, tokens, rows)

    def _choose(self) -> "_Batch | None":
        """The next chunks, and the page tables into which they are written, as they are now: a sequence may lose its pages
        to an older one while the step runs.
        """
        with self._hooks.lock:
            ready = self._admission.ready_to_prefill(self.index)
            if not ready:
                return None
            ready = self._turns.order(ready, self._admission.urgency)
            left = [sequence.prefill.num_left for sequence in ready]
            chosen, bucket = choose_rows(left, self._chunk_tokens, self.compiled)
            self._turns.ran(left[0], len(chosen) * bucket)
            chunks = [_Chunk(ready[index], min(bucket, left[index])) for index in chosen]
        return _Batch((len(chunks), bucket), chunks)

    def _receive_returned(self) -> bool:
        """Writes pages that come back from decode pools; whether any was written."""
        return write_arrived(self._returned, self._write_returned)

    def _returned(self) -> list[PageTransfer]:
        with self._hooks.lock:
            returning = self._admission.returning(self.index)
        return [transfer for transfer in returning if transfer.content.is_ready()]

    def _write_returned(self, transfer: PageTransfer) -> bool:
        """Writes it; False if it was not, and is not needed or has failed."""
        try:
            transfer.content.block_until_ready()
        except Exception:
            self._transfers[transfer.decode_worker].fail(transfer)
            return False
        with self._hooks.lock:
            if not self._admission.still_returning(transfer):
                return False
            pages = transfer.target_pages
        try:
            self.pool.scatter(pages, transfer.content)
        except Exception as error:
            raise StepFailed("return", [(transfer.sequence, transfer.first)], error) from error
        with self._hooks.lock:
            self._admission.return_written(transfer)
            self._hooks.prefilled(transfer.sequence)
        return True

    def failed_step(self) -> StepFailed | None:
        """The first dispatched step that has failed, if any; waits for steps that run."""
        if self._generation != self.pool.generation:
            return None
        for step in self._running:
            try:
                step.done.block_until_ready()
            except Exception as error:
                return step.failure(error)
        return None

    def _check_running(self) -> None:
        """Forgets finished chunks; raises StepFailed if one of them has failed."""
        if self._generation != self.pool.generation:
            # The failure of these chunks was reported when the pool failed, perhaps by the colocated decode worker.
            self._running.clear()
            self._generation = self.pool.generation
        self._wait_for(len(list(itertools.takewhile(lambda step: step.done.is_ready(), self._running))))

    def _wait_for(self, num_steps: int) -> None:
        """Waits for the oldest dispatched steps; raises StepFailed if one of them has failed."""
        if not num_steps:
            return
        steps = [self._running.popleft() for _ in range(num_steps)]
        for step in steps:
            try:
                step.done.block_until_ready()
            except Exception as error:
                raise step.failure(error) from error
        now = time.monotonic()
        with self._hooks.lock:
            for step in steps:
                self.watch.passed("prefill", [(chunk.sequence, chunk.end) for chunk in step.batch.chunks])
            self.speed.add([step.batch.num_tokens for step in steps], now - self._busy_since)
        self._busy_since = now

    def _run(self, batch: "_Batch") -> None:
        if len(self._running) == MAX_RUNNING:
            # So that an abort frees the device within two chunks, and a failed step is noticed.
            self._wait_for(1)
        rows = [(chunk.table_pages, chunk.start, chunk.tokens, self._weights.slot) for chunk in batch.chunks]
        tokens, metadata = padded_batch(batch.shape, self._table_len, rows)
        if not self._running:
            self._busy_since = time.monotonic()
        step = _Step(None, batch)
        try:
            step.done, step.order = self._call(tokens, metadata), self.pool.num_steps
        except Exception as error:
            raise step.failure(error) from error
        self._running.append(step)
        self.stats.calls += 1
        self.stats.tokens += batch.num_tokens
        self.stats.slots += tokens.size
        with self._hooks.lock:
            for chunk in batch.chunks:
                self._admission.prefilled(chunk.sequence, chunk.held, len(chunk.tokens))
                self._hooks.prefilled(chunk.sequence)

    def _send(self) -> bool:
        """Sends the next pages of every sequence while transfers to its decode worker have room."""
        sent = False
        for sequence in list(self._admission.prefilling[self.index]):
            kv_transfer = self._transfers[sequence.decode_worker]
            while True:
                with self._hooks.lock:
                    # It may have been requeued, for another worker.
                    room = sequence.prefill_worker == self.index and kv_transfer.has_room(sequence)
                    transfer = self._admission.next_transfer(sequence) if room else None
                if transfer is None:
                    break
                kv_transfer.send(transfer)
                sent = True
        if sent:
            # An idle decode worker does not poll for transfers.
            self._hooks.wake()
        return sent

    def _leave(self) -> bool:
        gone = self._admission.leave_prefill(self.index)
        for sequence in gone:
            self._hooks.prefilled(sequence)
        if gone:
            self._hooks.wake()
        return bool(gone)
