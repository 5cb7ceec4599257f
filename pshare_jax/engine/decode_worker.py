"""The decode worker: generates for all its tasks from base KV in its pool, many sequences per step.

The worker's thread calls `step`: it receives transfers and runs one decode step of one group of sequences, those with the
same weights except for their LoRA adapters, or one scoring step (schedule.py). The first input is the last prompt token, so
the task's own weights already choose the first answer token.

A decode step is dispatched before the tokens of the step before are fetched: its inputs are on the device (decode/rows.py).
So the host learns one step late that an answer has ended; what was computed beyond its end is dropped.
"""

import functools
import itertools
import logging
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from pshare_jax.engine import scoring
from pshare_jax.engine.admission import Admission
from pshare_jax.engine.decode.in_flight import StepInFlight
from pshare_jax.engine.decode.preemption import restore, save
from pshare_jax.engine.decode.report import report
from pshare_jax.engine.decode.rows import Groups, Row, RowSlots
from pshare_jax.engine.failures import RowFailed, StepFailed, StepWatch
from pshare_jax.engine.interfaces import EngineHooks, Module, TokenSampler, Weights, weights_of
from pshare_jax.engine.request import FAILED, Event, TokenLogprobs
from pshare_jax.engine.schedule import DecodeTurns
from pshare_jax.engine.sequence import Sequence, State
from pshare_jax.engine.shapes import CompiledShapes, Shape, bucket_of, row_buckets
from pshare_jax.engine.transfer import KVTransfer
from pshare_jax.model.paged_batch import DecodeBatch

logger = logging.getLogger(__name__)
MAX_IN_FLIGHT = 2
"""Dispatched decode steps: one that runs and one that is ready to follow."""


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
        pipelined: bool = True,
    ):
        self.index, self.pool = index, admission.decode_pools[index]
        self._tasks, self._admission, self._transfer, self._sampler = tasks, admission, transfer, sampler
        self._hooks, self._table_len, self._turns = hooks, table_len, DecodeTurns()
        self._max_in_flight = MAX_IN_FLIGHT if pipelined else 1
        self._in_flight: deque[StepInFlight] = deque()
        self._groups, self._generation = Groups(self._new_slots), self.pool.generation
        self.compiled = CompiledShapes(self._shapes)
        self.watch = StepWatch(self.compiled)
        self._ran: set[tuple[Any, Shape]] = set()
        self.num_preempted = 0
        self.num_steps = 0
        self.num_tokens = 0
        self.num_dropped = 0
        """Tokens that steps generated for sequences which had left by the time they were fetched."""
        self.num_scored = 0

    def _new_slots(self) -> RowSlots:
        num_slots = self._admission.max_rows
        tables = self.pool.store.empty_tables(num_slots + 1, self._table_len)
        return RowSlots(num_slots, self._sampler.new_rows(num_slots), tables)

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
            self._forget_lost()
            done = self._transfer.receive()
            with self._hooks.lock:
                for sequence in self._admission.arrived(self.index):
                    if sequence.request.prefetches:
                        self._hooks.end(sequence, State.FINISHED, sequence.prefetched())
                done = self._admission.reap_decode(self.index) or done
                self._groups.drop_left()
                started = self._admission.start_decoding(self.index)
                for sequence in started:
                    self._turns.join(sequence)
            if done or started:
                # Pages were released, in prefill pools too, and workers that wait for them may be asleep.
                self._hooks.wake()
            for sequence in started:
                if sequence.decode.saved is not None:
                    restore(sequence)
            done = self._transfer.send_back() or done
            return self._turn() or bool(started) or done
        except StepFailed as failure:
            logger.exception("a %s step of %s failed", failure.kind, self.pool.name)
            self._hooks.step_failed(self.pool, self.watch, failure, self._works)
            return True

    def _turn(self) -> bool:
        """One step, of a sequence with tokens to score or of a group that generates; else the step in flight is fetched."""
        with self._hooks.lock:
            decoding = self._admission.decoding[self.index]
            running = [sequence for sequence in decoding if not sequence.leaving and not sequence.decode.finishing]
            if scoring.SHAPE not in self.compiled:
                running = self._without_scoring(running)
            candidates = self._turns.order(running, self.compiled)
        for candidate in candidates:
            if not candidate[0].decode.opened:
                # Tokens that are generated by now do not wait for a scoring step.
                self._finish_all()
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
        if self._in_flight:
            self._finish()
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
                self._run_padding(weights, int(shape[0]))
        except Exception as error:
            logger.exception("the first %s step of %s failed", shape, self.pool.name)
            self.compiled.give_up(shape)
            self._hooks.step_failed(self.pool, self.watch, StepFailed("warm-up", [], error), lambda: True)
        return True

    def _works(self) -> bool:
        """Whether a step on padding alone succeeds with the weights of any task."""
        self._forget_lost()
        for weights in weights_of(self._tasks.values()):
            try:
                self._run_padding(weights, self._row_buckets()[0])
                return True
            except Exception:
                logger.exception("a decode step on padding failed in %s", self.pool.name)
                # It has taken the arrays with it.
                self.pool.store.reset()
                self._groups.lose()
        return False

    def _run_padding(self, weights: Weights, num_rows: int) -> None:
        slots = self._groups.spare()
        choose = slots.sampling.prepare([], [], [], num_rows)
        choose(self._call(weights, slots, DecodeBatch.empty(slots.sampling.tokens, num_rows, slots.num_slots))).fetch()

    def _call(self, weights: Weights, slots: RowSlots, batch: DecodeBatch) -> Any:
        self._ran.add((weights.paged.decode, (len(batch.slots),)))
        logits, slots.tables = self.pool.run(weights.paged.decode, weights.params, batch, slots.tables)
        return logits

    def failed_step(self) -> StepFailed | None:
        """The first step in flight that has failed, if any; waits for them."""
        if self._generation != self.pool.generation:
            return None
        for step in self._in_flight:
            try:
                step.pending.fetch()
            except Exception as error:
                return step.failure(error)
        return None

    def _forget_lost(self) -> None:
        """If the pool was rebuilt, all that steps have computed is lost, and their failure was reported."""
        if self._generation != self.pool.generation:
            self._in_flight.clear()
            self._groups.lose()
            self._generation = self.pool.generation

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
            self.watch.passed("scoring", [(one, place + num) for (one, place), num in zip(places, counts, strict=True)])
            for sequence, num_tokens, reported in zip(rows, counts, scores, strict=True):
                if not sequence.final:
                    report(self._hooks, sequence, functools.partial(sequence.scored, num_tokens, reported))
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
        return held is not None and held.fits(self._groups.num_tokens(sequence)) and not sequence.must_restart

    def _make_room(self, sequence: Sequence) -> None:
        """Allocates a page for its next token; if there is none, the youngest sequence gives its pages (perhaps itself)."""
        while sequence.state is State.DECODING and not sequence.must_restart:
            with self._hooks.lock:
                if self._admission.make_room(sequence, self._groups.num_tokens(sequence)):
                    return
                victim = None if self._in_flight else self._admission.victim(self.index)
                if victim is None and not self._in_flight:
                    return
                if victim is not None and (victim.must_restart or not self._decodes(victim)):
                    self._admission.put_aside(victim)
                    self._hooks.wake()
                    continue
            if victim is None:
                # Answers may have ended, and what a preempted sequence keeps must agree with what was reported.
                self._finish()
            else:
                self._preempt(victim)

    def _decodes(self, sequence: Sequence) -> bool:
        return sequence.state is State.DECODING and sequence.decode_worker == self.index

    def _preempt(self, sequence: Sequence) -> None:
        saved = save(sequence)
        with self._hooks.lock:
            if sequence.state is State.DECODING:
                sequence.decode.saved = saved
                self.num_preempted += 1
                self._admission.put_aside(sequence)
            else:
                self._admission.reap_decode(self.index)
        self._hooks.wake()

    def _run(self, batch: list[Sequence]) -> None:
        """Dispatches a step, and fetches the tokens of the step before."""
        num_rows = bucket_of(len(batch), self._row_buckets())
        try:
            slots = self._groups.of(batch[0].group)
        except Exception as error:
            raise self._first_failure(StepInFlight([], (num_rows,)), error) from error
        rows = self._joined(slots, batch)
        if not rows:
            return
        sequences, places = [row.sequence for row in rows], [row.num_tokens for row in rows]
        choose = slots.sampling.prepare(sequences, [row.slot for row in rows], places, num_rows)
        self._turns.served(sequences)
        step = StepInFlight(rows, (num_rows,))
        try:
            logits = self._call(rows[0].sequence.weights, slots, slots.inputs(rows, num_rows))
            step.order = self.pool.num_steps
        except Exception as error:
            raise self._first_failure(step, error) from error
        if any(row.num_ahead and row.sequence.matcher is not None for row in rows):
            # The forward pass runs meanwhile.
            self._finish_all()
        try:
            step.pending = choose(logits)
        except Exception as error:
            raise self._first_failure(step, error) from error
        with self._hooks.lock:
            for row in rows:
                slots.dispatched(row)
        self._in_flight.append(step)
        self.num_steps += 1
        # A suspect's step must be the only one that can fail.
        alone = any(row.sequence.suspect is not None for row in rows)
        while len(self._in_flight) >= (1 if alone else self._max_in_flight):
            self._finish()

    def _joined(self, slots: RowSlots, batch: list[Sequence]) -> list[Row]:
        """The sequences' rows; those that have none yet take a slot. Sequences that the sampler cannot use end."""
        rows = []
        for sequence in batch:
            row = slots.rows.get(sequence) or slots.take(sequence)
            try:
                if not row.joined:
                    self._join(slots, row)
                rows.append(row)
            except RowFailed as failed:
                logger.exception("the sampling of request %s failed", failed.sequence.request.id)
                self._hooks.end(failed.sequence, State.FAILED, Event(error=FAILED, retry=False))
        return rows

    def _join(self, slots: RowSlots, row: Row) -> None:
        """Writes the slot's arrays."""
        held = row.sequence.decode.table
        assert held is not None
        try:
            slots.tables = self.pool.store.put_table(slots.tables, row.slot, held.pages)
            slots.sampling.join(row.slot, row.sequence)
        except RowFailed:
            raise
        except Exception as error:
            raise self._first_failure(StepInFlight([row], None), error) from error
        row.joined = True

    def _first_failure(self, step: StepInFlight, error: Exception) -> StepFailed:
        """The failure of a step that could not be dispatched, unless that is because a step in flight has failed."""
        self._finish_all()
        return step.failure(error)

    def _finish_all(self) -> None:
        while self._in_flight:
            self._finish()

    def _finish(self) -> None:
        """Fetches the tokens of the oldest step in flight, and reports them."""
        step = self._in_flight.popleft()
        try:
            chosen = step.pending.fetch()
        except Exception as error:
            raise step.failure(error) from error
        with self._hooks.lock:
            self.watch.passed("decode", [(sequence, place + 1) for sequence, place in step.places])
            for index, row in enumerate(step.rows):
                row.num_ahead -= 1
                if row.left:
                    self.num_dropped += 1
                    continue
                self.num_tokens += 1
                report(
                    self._hooks,
                    row.sequence,
                    lambda index=index, row=row: row.sequence.accept(*chosen(index, row.sequence)),
                )
            if self._admission.reap_decode(self.index):
                self._hooks.wake()
