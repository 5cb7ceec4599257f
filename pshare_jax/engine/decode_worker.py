"""The decode worker: generates for all its tasks from base KV in its pool, many sequences per step.

The worker's thread calls `step`: it receives transfers and runs one decode step of one group of sequences, those with the
same weights; groups take turns. The first input is the last prompt token, so the task's own weights already choose the
first answer token.
"""

import itertools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from pshare_jax.engine import scoring
from pshare_jax.engine.admission import Admission
from pshare_jax.engine.interfaces import EngineHooks, TokenSampler, Weights
from pshare_jax.engine.kv.pool import PageTable
from pshare_jax.engine.request import Event
from pshare_jax.engine.sequence import Saved, Sequence, State
from pshare_jax.engine.shapes import CompiledShapes, Shape, bucket_of, padded_batch, pages_for, row_buckets
from pshare_jax.engine.transfer import KVTransfer
from pshare_jax.model.paged_batch import PagedBatch

logger = logging.getLogger(__name__)


class DecodeWorker:
    """Decodes the sequences of one decode worker."""

    def __init__(
        self,
        index: int,
        tasks: Mapping[str, Weights],
        admission: Admission,
        transfer: KVTransfer,
        sampler: TokenSampler,
        hooks: EngineHooks,
        max_rows: int,
        table_len: int,
    ):
        self.index, self.pool = index, admission.decode_pools[index]
        self._tasks, self._admission, self._transfer, self._sampler = tasks, admission, transfer, sampler
        self._hooks, self._max_rows, self._table_len = hooks, max_rows, table_len
        self._turns = itertools.count(1)
        self.compiled = CompiledShapes()
        self._ran: set[tuple[Any, Shape]] = set()
        self.num_preempted = 0
        self.num_steps = 0
        self.num_tokens = 0
        self.num_scored = 0

    @property
    def tasks(self) -> Mapping[str, Weights]:
        """The weights for new requests, by task. Never changed in place, so it may be read without the lock."""
        return self._tasks

    def put_task(self, name: str, weights: Weights | None) -> None:
        """New requests for the task decode with these weights; None removes the task."""
        tasks = dict(self._tasks)
        if weights is None:
            tasks.pop(name, None)
        else:
            tasks[name] = weights
        self._tasks = tasks

    @property
    def must_poll(self) -> bool:
        """Whether the worker may have something to do without a wake-up: a transfer in flight may arrive."""
        return self._transfer.in_flight > 0

    def step(self) -> bool:
        """Receives transfers and generates a token for each sequence of a group; False if there was nothing to do."""
        try:
            done = self._transfer.receive()
            with self._hooks.lock:
                done = self._admission.reap_decode(self.index) or done
                started = self._admission.start_decoding(self.index)
            if done or started:
                # Pages were released, in prefill pools too, and workers that wait for them may be asleep.
                self._hooks.wake()
            for sequence in started:
                if sequence.decode.saved is not None:
                    restore(sequence)
            return self._turn() or bool(started) or done
        except Exception:
            self._failed()
            return True

    def _turn(self) -> bool:
        """One step, of a sequence with prompt tokens to score or of a group that generates."""
        with self._hooks.lock:
            waiting = [sequence for sequence in self._admission.decoding[self.index] if not sequence.final]
        if scoring.SHAPE not in self.compiled:
            waiting = self._without_scoring(waiting)
        if not waiting:
            return False
        waiting.sort(key=lambda sequence: (sequence.decode.last_turn, sequence.number))
        if not waiting[0].decode.opened:
            self._score(waiting[0])
            return True
        batch = self._next_batch([sequence for sequence in waiting if sequence.decode.opened])
        if batch:
            self._run(batch)
        return bool(batch)

    def _without_scoring(self, waiting: list[Sequence]) -> list[Sequence]:
        """The sequences that need no scoring step; the others wait for its program, or fail if there will be none."""
        if not self.compiled.may_be_used(scoring.SHAPE):
            for sequence in waiting:
                if not sequence.decode.opened:
                    self._hooks.end(sequence, State.FAILED, Event(error=scoring.UNAVAILABLE))
        return [sequence for sequence in waiting if sequence.decode.opened]

    @property
    def next_cold(self) -> tuple[Weights, Shape] | None:
        """Weights and shape of a compiled step that has not run yet."""
        shapes: list[Shape] = [*((rows,) for rows in row_buckets(self._max_rows)), scoring.SHAPE]
        compiled = [shape for shape in shapes if self.compiled.knows(shape)]
        steps = itertools.product(self._tasks.values(), compiled)
        return next((step for step in steps if (step[0].paged.decode, step[1]) not in self._ran), None)

    def warm_up(self) -> bool:
        """Runs such a step on padding alone, since a first run is slow; False if there is none."""
        if (step := self.next_cold) is None:
            return False
        weights, shape = step
        try:
            if shape == scoring.SHAPE:
                self._call_score(weights, *scoring.no_rows(self._table_len))
            else:
                logits = self._call(weights, *padded_batch((int(shape[0]), 1), self._table_len))
                self._sampler.sample(logits, [])
        except Exception:
            self.compiled.give_up(shape)
            self._failed()
        return True

    def _call(self, weights: Weights, tokens: np.ndarray, rows: PagedBatch) -> Any:
        self._ran.add((weights.paged.decode, (len(tokens),)))
        return self.pool.run(weights.paged.decode, weights.params, tokens, rows)

    def _call_score(self, weights: Weights, tokens: np.ndarray, rows: Any) -> Any:
        self._ran.add((weights.paged.decode, scoring.SHAPE))
        return self.pool.run(weights.paged.score, weights.params, tokens, rows)

    def _score(self, sequence: Sequence) -> None:
        """Runs a scoring step on the sequence's next prompt tokens."""
        num_tokens, scores = 0, []
        sequence.decode.last_turn = next(self._turns)
        if sequence.to_score[0] < sequence.to_score[1]:
            tokens, rows, num_tokens = scoring.next_rows(sequence, self._table_len)
            result = self._call_score(sequence.decode.weights, tokens, rows)
            if sequence.request.scores_prompt:
                scores = scoring.reported(sequence, result, num_tokens)
        self.num_scored += num_tokens
        with self._hooks.lock:
            if not sequence.final and (event := sequence.scored(num_tokens, scores)) is not None:
                self._give(sequence, event)
            if self._admission.reap_decode(self.index):
                self._hooks.wake()

    def _failed(self) -> None:
        logger.exception("a decode step of %s failed", self.pool.name)
        self._hooks.pool_failed(self.pool)

    def _next_batch(self, waiting: list[Sequence]) -> list[Sequence]:
        """Sequences with the first sequence's weights, in this order, each with room for its next token."""
        params = waiting[0].decode.weights.params
        group = [sequence for sequence in waiting if sequence.decode.weights.params is params]
        group = group[: self._row_buckets()[-1]]
        for sequence in sorted(group, key=lambda sequence: sequence.number):
            self._make_room(sequence)
        return [sequence for sequence in group if sequence.state is State.DECODING and self._has_room(sequence)]

    def _row_buckets(self) -> list[int]:
        return [rows for rows in row_buckets(self._max_rows) if (rows,) in self.compiled]

    def _has_room(self, sequence: Sequence) -> bool:
        held = sequence.decode.table
        return held is not None and held.fits(sequence.num_tokens)

    def _make_room(self, sequence: Sequence) -> None:
        """Allocates a page for its next token, if necessary by preempting the youngest sequence (perhaps itself)."""
        while sequence.state is State.DECODING:
            with self._hooks.lock:
                if self._admission.make_room(sequence):
                    return
                victim = self._admission.victim(self.index)
            if victim is None:
                return
            self._preempt(victim)

    def _preempt(self, sequence: Sequence) -> None:
        saved = save(sequence)
        with self._hooks.lock:
            if sequence.state is State.DECODING:
                sequence.decode.saved = saved
                self.num_preempted += 1
                self._admission.preempted(sequence)
            else:
                self._admission.reap_decode(self.index)
        self._hooks.wake()

    def _run(self, batch: list[Sequence]) -> None:
        num_rows, turn, chunks = bucket_of(len(batch), self._row_buckets()), next(self._turns), []
        for sequence in batch:
            held = sequence.decode.table
            assert held is not None
            chunks.append((held.pages, sequence.next_position, (sequence.next_input,)))
            sequence.decode.last_turn = turn
        logits = self._call(batch[0].decode.weights, *padded_batch((num_rows, 1), self._table_len, chunks))
        sampled = self._sampler.sample(logits, batch)
        self.num_steps += 1
        self.num_tokens += len(batch)
        with self._hooks.lock:
            for row, sequence in enumerate(batch):
                if sequence.final:
                    continue
                event = sequence.accept(*sampled(row, sequence))
                if event.completion_tokens == 1:
                    self._hooks.first_token(sequence)
                self._give(sequence, event)
            if self._admission.reap_decode(self.index):
                self._hooks.wake()

    def _give(self, sequence: Sequence, event: Event) -> None:
        if event.last:
            self._hooks.end(sequence, State.FINISHED, event)
        else:
            sequence.on_event(event)


def save(sequence: Sequence) -> Saved:
    """Copies a preempted sequence's private pages to the host: the base can recompute only the prompt's full pages."""
    held, private = _private_pages(sequence)
    most = held.pool.move_pages
    starts = range(0, len(private), most)
    return Saved([np.asarray(held.pool.store.gather(private[start : start + most])) for start in starts])


def restore(sequence: Sequence) -> None:
    """Writes the saved content into the sequence's new pages."""
    held, private = _private_pages(sequence)
    assert sequence.decode.saved is not None
    most = held.pool.move_pages
    for index, content in enumerate(sequence.decode.saved.parts):
        held.pool.scatter(private[index * most : (index + 1) * most], held.pool.store.device_put(content))
    sequence.decode.saved = None


def _private_pages(sequence: Sequence) -> tuple[PageTable, list[int]]:
    """The page table, and the pages behind the prompt's full pages that hold KV."""
    held = sequence.decode.table
    assert held is not None
    return held, held.pages[len(sequence.keys) : pages_for(sequence.next_position, held.pool.page_size)]
