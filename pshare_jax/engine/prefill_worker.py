"""The prefill worker: computes KV pages of contexts with the base, chunk by chunk, and never samples.

The worker's thread calls `step`: at most one chunk, of one sequence or of a few short sequences, is dispatched; full pages
are published at once and sent to the decode worker, so that the transfer overlaps the next chunk.
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
from pshare_jax.engine.shapes import CompiledShapes, choose_rows, padded_batch, prefill_shapes
from pshare_jax.engine.transfer import KVTransfer
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


class PrefillWorker:
    """Prefills the contexts of the sequences routed to it, in order of admission."""

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
                    if sequence.admitted == sequence.progressed:
                        self._hooks.admitted(sequence)
            if done or admitted:
                # Pages were released, or a full decode pool's priority has moved: workers that wait for it may be asleep.
                self._hooks.wake()
            done = self._send() or done
            with self._hooks.lock:
                batch, bucket = self._choose()
            if batch:
                self._run(batch, bucket)
                self._send()
            with self._hooks.lock:
                return self._leave() or bool(batch) or done
        except Exception:
            self._failed()
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
        remaining = [sequence.prefill.context_len - sequence.prefill.num_prefilled for sequence in ready]
        chosen, bucket = choose_rows(remaining, self._chunk_tokens, self.compiled)
        return [ready[index] for index in chosen], bucket

    def _check_running(self) -> None:
        """Forgets finished chunks; raises if one of them has failed."""
        if self._generation != self.pool.generation:
            # The failure of these chunks was reported when the pool failed, perhaps by the colocated decode worker.
            self._running.clear()
            self._generation = self.pool.generation
        self._wait_for(len(list(itertools.takewhile(lambda step: step[0].is_ready(), self._running))))

    def _wait_for(self, num_steps: int) -> None:
        """Waits for the oldest dispatched steps; raises if one of them has failed."""
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
            # So that an abort frees the device within two chunks, and a failed step is noticed.
            self._wait_for(1)
        chunks = []
        for sequence in batch:
            held, start = sequence.prefill.table, sequence.prefill.num_prefilled
            assert held is not None
            end = min(start + bucket, sequence.prefill.context_len)
            chunks.append((held.pages, start, sequence.request.prompt[start:end]))
        counts = [len(chunk) for _, _, chunk in chunks]
        tokens, rows = padded_batch((len(batch), bucket), self._table_len, chunks)
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
        """Sends the next pages of every sequence while transfers to its decode worker have room."""
        sent = False
        for sequence in list(self._admission.prefilling[self.index]):
            kv_transfer, most = self._transfers[sequence.decode_worker], self.pool.move_pages
            while True:
                with self._hooks.lock:
                    room = kv_transfer.has_room(sequence)
                    transfer = self._admission.next_transfer(sequence, most) if room else None
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
