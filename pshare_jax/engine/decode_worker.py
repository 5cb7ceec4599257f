"""The decode worker: generates for all its tasks from base KV in its pool, many sequences per step.

The worker's thread calls `step`: it receives transfers and runs one decode step of one group of sequences, those with the
same weights, or one scoring step (schedule.py). The first input is the last prompt token, so the task's own weights already
choose the first answer token.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pshare_jax.engine import scoring
from pshare_jax.engine.admission import Admission
from pshare_jax.engine.failures import RowFailed, StepFailed, StepWatch
from pshare_jax.engine.interfaces import EngineHooks, Module, TokenSampler, Weights, weights_of
from pshare_jax.engine.kv.pool import PageTable
from pshare_jax.engine.request import FAILED, Event, TokenLogprobs
from pshare_jax.engine.schedule import DecodeTurns
from pshare_jax.engine.sequence import Saved, Sequence, State
from pshare_jax.engine.shapes import CompiledShapes, Shape, bucket_of, padded_batch, pages_for, row_buckets
from pshare_jax.engine.transfer import KVTransfer
from pshare_jax.model.paged_batch import PagedBatch
from pshare_jax.text.grammar import GrammarFailed

logger = logging.getLogger(__name__)


class DecodeWorker:
    """Decodes the sequences of one decode worker."""

    def __init__(
        self,
        index: int,
        tasks: Mapping[str, Module],
        admission: Admission,
        transfer: KVTransfer,
        sampler: TokenSampler,
        hooks: EngineHooks,
        table_len: int,
    ):
        self.index, self.pool = index, admission.decode_pools[index]
        self._tasks, self._admission, self._transfer, self._sampler = tasks, admission, transfer, sampler
        self._hooks, self._table_len, self._turns = hooks, table_len, DecodeTurns()
        self.compiled = CompiledShapes(self._shapes)
        self._watch = StepWatch(self.compiled)
        self._ran: set[tuple[Any, Shape]] = set()
        self.num_preempted = 0
        self.num_steps = 0
        self.num_tokens = 0
        self.num_scored = 0

    @property
    def _shapes(self) -> list[Shape]:
        return [*((rows,) for rows in row_buckets(self._admission.max_rows)), scoring.SHAPE, scoring.SHORT]

    @property
    def tasks(self) -> Mapping[str, Module]:
        """The decode modules for new requests, by task. Never changed in place, so it may be read without the lock."""
        return self._tasks

    def put_task(self, name: str, module: Module | None) -> None:
        """New requests for the task decode with this module; None removes the task."""
        tasks = dict(self._tasks)
        if module is None:
            tasks.pop(name, None)
        else:
            tasks[name] = module
        self._tasks = tasks

    @property
    def must_poll(self) -> bool:
        """Whether the worker may have something to do without a wake-up: a transfer in flight may arrive, or pages that are
        to go back may be awaited no longer.
        """
        return self._transfer.in_flight > 0 or self._admission.has_returning(self.index)

    def step(self) -> bool:
        """Receives transfers and generates a token for each sequence of a group; False if there was nothing to do."""
        try:
            done = self._transfer.receive()
            with self._hooks.lock:
                for sequence in self._admission.arrived(self.index):
                    if sequence.request.prefetches:
                        self._hooks.end(sequence, State.FINISHED, sequence.prefetched())
                done = self._admission.reap_decode(self.index) or done
                started = self._admission.start_decoding(self.index)
                for sequence in started:
                    self._turns.join(sequence)
            if done or started:
                # Pages were released, in prefill pools too, and workers that wait for them may be asleep.
                self._hooks.wake()
            for sequence in started:
                self._restore(sequence)
            done = self._transfer.send_back() or done
            return self._turn() or bool(started) or done
        except StepFailed as failure:
            logger.exception("a %s step of %s failed", failure.kind, self.pool.name)
            self._hooks.step_failed(self.pool, self._watch, failure, self._works)
            return True

    def _turn(self) -> bool:
        """One step, of a sequence with tokens to score or of a group that generates."""
        with self._hooks.lock:
            running = [s for s in self._admission.decoding[self.index] if not s.leaving]
            if scoring.SHAPE not in self.compiled:
                running = self._without_scoring(running)
            candidates = self._turns.order(running, self.compiled)
        for candidate in candidates:
            # Making room for one candidate may have taken the pages of others.
            rows = [
                sequence for sequence in candidate if sequence.state is State.DECODING and not sequence.must_restart
            ]
            if not rows:
                continue
            if not rows[0].decode.opened:
                self._score(rows)
                return True
            if batch := self._with_room(rows[: self._row_buckets()[-1]]):
                self._run(batch)
                return True
        return False

    def _without_scoring(self, running: list[Sequence]) -> list[Sequence]:
        """The sequences that need no scoring step; the others wait for its program, or fail if there will be none."""
        if not self.compiled.may_be_used(scoring.SHAPE):
            for sequence in running:
                if not sequence.decode.opened:
                    self._hooks.end(sequence, State.FAILED, Event(error=scoring.UNAVAILABLE))
        return [sequence for sequence in running if sequence.decode.opened]

    @property
    def next_cold(self) -> tuple[Weights, Shape] | None:
        """Weights and shape of a compiled step that has not run yet."""
        compiled = [shape for shape in self._shapes if self.compiled.knows(shape)]
        steps = itertools.product(weights_of(self._tasks.values()), compiled)
        return next((step for step in steps if (step[0].paged.decode, step[1]) not in self._ran), None)

    def warm_up(self) -> bool:
        """Runs such a step on padding alone, since a first run is slow; False if there is none."""
        if (step := self.next_cold) is None:
            return False
        weights, shape = step
        try:
            if shape in (scoring.SHAPE, scoring.SHORT):
                self._call_score(weights, *scoring.no_rows(shape, self._table_len))
            else:
                logits = self._call(weights, *padded_batch((int(shape[0]), 1), self._table_len))
                self._sampler.prepare([], int(shape[0]))(logits)
        except Exception as error:
            logger.exception("the first %s step of %s failed", shape, self.pool.name)
            self.compiled.give_up(shape)
            self._hooks.step_failed(self.pool, self._watch, StepFailed("warm-up", [], error), lambda: True)
        return True

    def _works(self) -> bool:
        """Whether a step on padding alone succeeds with the weights of any task."""
        num_rows = self._row_buckets()[0]
        for weights in {id(weights): weights for weights in self._tasks.values()}.values():
            try:
                logits = self._call(weights, *padded_batch((num_rows, 1), self._table_len))
                self._sampler.prepare([], num_rows)(logits)
                return True
            except Exception:
                logger.exception("a decode step on padding failed in %s", self.pool.name)
                # It has taken the arrays with it.
                self.pool.store.reset()
        return False

    def _call(self, weights: Weights, tokens: np.ndarray, rows: PagedBatch) -> Any:
        self._ran.add((weights.paged.decode, (len(tokens),)))
        return self.pool.run(weights.paged.decode, weights.params, tokens, rows)

    def _call_score(self, weights: Weights, tokens: np.ndarray, rows: Any) -> Any:
        self._ran.add((weights.paged.decode, ("score", len(tokens))))
        return self.pool.run(weights.paged.score, weights.params, tokens, rows)

    # --- scoring ---------------------------------------------------------------------------------------------------

    def _score(self, rows: list[Sequence]) -> None:
        """Runs a scoring step on the sequences' next tokens; one sequence alone may have none left."""
        self._turns.served(rows)
        places = [(sequence, sequence.decode.num_scored) for sequence in rows]
        counts, scores = [0], [[]]
        if rows[0].to_score[0] < rows[0].to_score[1]:
            shape = scoring.SHAPE if len(rows) == 1 else scoring.SHORT
            tokens, metadata, counts = scoring.next_rows(rows, shape, self._table_len)
            try:
                # Read even if nothing is reported, or a late failure would be blamed on the next step's sequences.
                result = [np.asarray(array) for array in self._call_score(rows[0].weights, tokens, metadata)]
                scores = [self._reported(sequence, row, result, counts[row]) for row, sequence in enumerate(rows)]
            except Exception as error:
                raise StepFailed("scoring", places, error, shape) from error
        self.num_scored += sum(counts)
        with self._hooks.lock:
            self._watch.passed(
                "scoring", [(one, place + num) for (one, place), num in zip(places, counts, strict=True)]
            )
            for sequence, num_tokens, reported in zip(rows, counts, scores, strict=True):
                if not sequence.final:
                    self._report(sequence, functools.partial(sequence.scored, num_tokens, reported))
            if self._admission.reap_decode(self.index):
                self._hooks.wake()

    def _reported(self, sequence: Sequence, row: int, result: Any, num_tokens: int) -> list[TokenLogprobs]:
        if not sequence.request.scores_prompt or sequence.decode.reported:
            return []
        return scoring.reported(sequence, row, result, num_tokens)

    # --- decoding --------------------------------------------------------------------------------------------------

    def _with_room(self, rows: list[Sequence]) -> list[Sequence]:
        """The rows that have room for their next token; the oldest get pages first, if necessary from the youngest."""
        for sequence in sorted(rows, key=lambda sequence: sequence.number):
            self._make_room(sequence)
        return [sequence for sequence in rows if sequence.state is State.DECODING and self._has_room(sequence)]

    def _row_buckets(self) -> list[int]:
        return [rows for rows in row_buckets(self._admission.max_rows) if (rows,) in self.compiled]

    def _has_room(self, sequence: Sequence) -> bool:
        held = sequence.decode.table
        return held is not None and held.fits(sequence.num_tokens) and not sequence.must_restart

    def _make_room(self, sequence: Sequence) -> None:
        """Allocates a page for its next token; if there is none, the youngest sequence gives its pages (perhaps itself)."""
        while sequence.state is State.DECODING and not sequence.must_restart:
            with self._hooks.lock:
                if self._admission.make_room(sequence):
                    return
                victim = self._admission.victim(self.index)
                if victim is None:
                    return
                decodes_here = victim.state is State.DECODING and victim.decode_worker == self.index
                if not decodes_here or victim.must_restart:
                    self._admission.put_aside(victim)
                    self._hooks.wake()
                    continue
            self._preempt(victim)

    def _preempt(self, sequence: Sequence) -> None:
        try:
            saved = save(sequence)
        except Exception as error:
            raise StepFailed("preemption", [(sequence, sequence.num_tokens)], error) from error
        with self._hooks.lock:
            if sequence.state is State.DECODING:
                sequence.decode.saved = saved
                self.num_preempted += 1
                self._admission.put_aside(sequence)
            else:
                self._admission.reap_decode(self.index)
        self._hooks.wake()

    def _restore(self, sequence: Sequence) -> None:
        if sequence.decode.saved is None:
            return
        try:
            restore(sequence)
        except Exception as error:
            raise StepFailed("preemption", [(sequence, sequence.num_tokens)], error) from error

    def _run(self, batch: list[Sequence]) -> None:
        num_rows = bucket_of(len(batch), self._row_buckets())
        batch, choose = self._prepared(batch, num_rows)
        if not batch:
            return
        self._turns.served(batch)
        chunks, places = [], [(sequence, sequence.num_tokens) for sequence in batch]
        for sequence in batch:
            held = sequence.decode.table
            assert held is not None
            chunks.append((held.pages, sequence.next_position, (sequence.next_input,)))
        try:
            logits = self._call(batch[0].weights, *padded_batch((num_rows, 1), self._table_len, chunks))
            chosen = choose(logits)
        except Exception as error:
            raise StepFailed("decode", places, error, (num_rows,)) from error
        self.num_steps += 1
        self.num_tokens += len(batch)
        with self._hooks.lock:
            self._watch.passed("decode", [(sequence, place + 1) for sequence, place in places])
            for row, sequence in enumerate(batch):
                if not sequence.final:
                    self._report(sequence, lambda row=row, sequence=sequence: sequence.accept(*chosen(row, sequence)))
            if self._admission.reap_decode(self.index):
                self._hooks.wake()

    def _prepared(self, batch: list[Sequence], num_rows: int) -> tuple[list[Sequence], Any]:
        """The host's part of sampling; sequences for which it fails end, and leave the batch."""
        while batch:
            try:
                return batch, self._sampler.prepare(batch, num_rows)
            except RowFailed as failed:
                logger.exception("the sampling of request %s failed", failed.sequence.request.id)
                self._hooks.end(failed.sequence, State.FAILED, Event(error=FAILED, retry=False))
                batch = [sequence for sequence in batch if sequence is not failed.sequence]
        return batch, None

    def _report(self, sequence: Sequence, make: Callable[[], Event | None]) -> None:
        """Makes and reports an event, if there is one; if the host fails at that, only this sequence fails."""
        try:
            event = make()
            if event is None:
                return
            if event.completion_tokens == 1:
                self._hooks.first_token(sequence)
            if event.last:
                self._hooks.end(sequence, State.FINISHED, event)
            else:
                sequence.on_event(event)
        except GrammarFailed as error:
            self._hooks.end(sequence, State.FAILED, Event(error=str(error), retry=False))
        except Exception:
            logger.exception("the output of request %s failed", sequence.request.id)
            self._hooks.end(sequence, State.FAILED, Event(error=FAILED, retry=False))


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
