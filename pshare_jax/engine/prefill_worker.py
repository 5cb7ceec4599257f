"""The prefill worker: turns contexts into KV pages with the base, chunk by chunk, and never samples.

Whoever owns the worker calls `step`: at most one chunk, of one sequence or of a few short ones, is dispatched; what is
complete is published at once and sent to the decode worker, so that the copy overlaps the next chunk.
"""

import itertools
import logging
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from pshare_jax.engine.admission import Admission
from pshare_jax.engine.interfaces import EngineHooks, Weights
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.shapes import CompiledShapes, choose_rows, prefill_shapes
from pshare_jax.engine.transfer import KVTransfer
from pshare_jax.model.paged_batch import PagedBatch

logger = logging.getLogger(__name__)
MAX_RUNNING = 2
"""Chunks under way: one that runs and one that is ready to follow."""


@dataclass
class PrefillStats:
    """Prefill steps so far: calls, tokens fed, and slots that the calls had (the rest is padding)."""

    calls: int = 0
    tokens: int = 0
    slots: int = 0


class PrefillSpeed:
    """Tokens and seconds of finished steps, by size within a factor of two. Used under the engine's lock."""

    def __init__(self) -> None:
        self._tokens: defaultdict[int, int] = defaultdict(int)
        self._seconds: defaultdict[int, float] = defaultdict(float)

    def add(self, steps: list[int], seconds: float) -> None:
        """Steps with so many tokens each finished one after another, in so many seconds together."""
        for num_tokens in steps:
            size = num_tokens.bit_length()
            self._tokens[size] += num_tokens
            self._seconds[size] += seconds * num_tokens / sum(steps)

    @property
    def seconds(self) -> float:
        """Seconds in which a step ran."""
        return sum(self._seconds.values(), 0.0)

    @property
    def best(self) -> float | None:
        """Tokens per second at the fastest size; None before any step has finished."""
        rates = (self._tokens[size] / seconds for size, seconds in self._seconds.items() if seconds > 0)
        return max(rates, default=None)


class PrefillWorker:
    """Prefills the contexts of the sequences that the router gave it, the first admitted first."""

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
        self.index, self.pool = index, admission.prefill_pools[index]
        self._weights, self._admission, self._transfers, self._hooks = weights, admission, transfers, hooks
        self._chunk_tokens, self._table_len = chunk_tokens, table_len
        self._running: deque[tuple[Any, int]] = deque()
        self._busy_since = 0.0
        self._generation = self.pool.generation
        self.stats = PrefillStats()
        self.speed = PrefillSpeed()
        self.compiled = CompiledShapes()
        self._ran: set[tuple[int, int]] = set()

    @property
    def must_poll(self) -> bool:
        """Whether something can happen without a wake-up: a chunk ends or fails, a full way to a decode worker has room."""
        return bool(self._running) or bool(self._admission.prefilling[self.index])

    def step(self) -> bool:
        """Admits, sends what can be sent and runs one chunk; False if there was nothing to do."""
        try:
            self._look_at_running()
            with self._hooks.lock:
                done = self._admission.reap_prefill(self.index)
                admitted = self._admission.admit(self.index)
            if done or admitted:
                # Pages have come free, on the decode side too, or a full decode pool has another next: they may be asleep.
                self._hooks.wake()
            done = self._send() or done
            with self._hooks.lock:
                batch, bucket = self._choose()
            if batch:
                self._run(batch, bucket)
                self._send()
            with self._hooks.lock:
                return self._hand_on() or bool(batch) or done
        except Exception:
            self._failed()
            return True

    @property
    def next_cold(self) -> tuple[int, int] | None:
        """The shape of a step that is compiled and never ran."""
        compiled = [shape for shape in prefill_shapes(self._chunk_tokens) if self.compiled.knows(shape)]
        return next((shape for shape in compiled if shape not in self._ran), None)

    def warm_up(self) -> bool:
        """Runs a step that never ran, on no sequence, since a first run is slow; False if there is none."""
        if (shape := self.next_cold) is None:
            return False
        try:
            self._call(np.zeros(shape, np.int32), PagedBatch.empty(shape[0], self._table_len)).block_until_ready()
        except Exception:
            self.compiled.give_up(shape)
            self._failed()
        return True

    def _call(self, tokens: np.ndarray, rows: PagedBatch) -> Any:
        num_rows, bucket = tokens.shape
        self._ran.add((num_rows, bucket))
        return self.pool.run(self._weights.paged.prefill, self._weights.params, tokens, rows)

    def _failed(self) -> None:
        logger.exception("a prefill step of %s failed", self.pool.name)
        self._hooks.pool_failed(self.pool)

    def _choose(self) -> tuple[list[Sequence], int]:
        ready = self._admission.ready_to_prefill(self.index)
        if not ready:
            return [], 0
        remaining = [one.prefill.context_len - one.prefill.num_prefilled for one in ready]
        chosen, bucket = choose_rows(remaining, self._chunk_tokens, self.compiled)
        return [ready[index] for index in chosen], bucket

    def _look_at_running(self) -> None:
        """Forgets chunks that are done; raises if one of them has failed."""
        if self._generation != self.pool.generation:
            # What ran when the pool failed has been told, perhaps by the decode worker that shares the pool.
            self._running.clear()
            self._generation = self.pool.generation
        num_done = sum(1 for _ in itertools.takewhile(lambda one: one[0].is_ready(), self._running))
        self._wait_for(num_done)

    def _wait_for(self, num_steps: int) -> None:
        """For the steps that were dispatched first; raises if one of them has failed."""
        if not num_steps:
            return
        steps = [self._running.popleft() for _ in range(num_steps)]
        for done, _ in steps:
            done.block_until_ready()
        now = time.monotonic()
        with self._hooks.lock:
            self.speed.add([num_tokens for _, num_tokens in steps], now - self._busy_since)
        self._busy_since = now

    def _run(self, batch: list[Sequence], bucket: int) -> None:
        if len(self._running) == MAX_RUNNING:
            # An abort then frees the device within two chunks, and a failed step is seen.
            self._wait_for(1)
        tokens = np.zeros((len(batch), bucket), np.int32)
        rows = PagedBatch.empty(len(batch), self._table_len)
        counts = []
        for row, sequence in enumerate(batch):
            held, start = sequence.prefill.table, sequence.prefill.num_prefilled
            assert held is not None
            chunk = sequence.request.prompt[start : min(start + bucket, sequence.prefill.context_len)]
            tokens[row, : len(chunk)] = chunk
            rows.fill(row, held.pages, start, len(chunk))
            counts.append(len(chunk))
        if not self._running:
            self._busy_since = time.monotonic()
        self._running.append((self._call(tokens, rows), sum(counts)))
        self.stats.calls += 1
        self.stats.tokens += sum(counts)
        self.stats.slots += tokens.size
        with self._hooks.lock:
            for sequence, count in zip(batch, counts, strict=True):
                self._admission.prefilled(sequence, count)
                self._hooks.prefilled(sequence)

    def _send(self) -> bool:
        """Sends the next pages of every sequence, as far as their decode workers' ways have room."""
        sent = False
        for sequence in list(self._admission.prefilling[self.index]):
            transfer = self._transfers[sequence.decode_worker]
            while True:
                with self._hooks.lock:
                    most = self.pool.move_pages
                    copy = self._admission.next_transfer(sequence, most) if transfer.has_room(sequence) else None
                if copy is None:
                    break
                transfer.send(copy)
                sent = True
        if sent:
            # A decode worker that had nothing to do does not look for copies by itself.
            self._hooks.wake()
        return sent

    def _hand_on(self) -> bool:
        gone = self._admission.leave_prefill(self.index)
        for sequence in gone:
            self._hooks.prefilled(sequence)
        if gone:
            self._hooks.wake()
        return bool(gone)
