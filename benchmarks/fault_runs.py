"""Runs of the fault table: the requests, an engine with a fault, turns of its workers, and what became of everybody.

The engine is stepped in turn, without threads; what a worker's thread does when a step raises is done here. World needs
tests/helpers on the path.
"""

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.fault_cells import FAULTS, PLACEMENTS, PREEMPTION, RETURN, Cell
from benchmarks.fault_points import Death, Fault, Injected, Point, watched_engine
from pshare_jax.engine import admission
from pshare_jax.engine.engine import Engine, EngineDown
from pshare_jax.engine.failures import WorkerBroken
from pshare_jax.engine.request import Event, Request
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.worker_thread import RESTART_SECONDS, WorkerGroup
from pshare_jax.sampling.params import SamplingParams

PAGES, SMALL_POOL = 64, 22
"""Pages of a pool, and of a decode pool that makes preemption necessary."""
MOST_TURNS, STILL_TURNS = 4000, 40
"""A run that takes more turns hangs; after so many turns without any progress the first deadline passes."""
CLOSE = 1e-3
"""Absolute difference of a score to the one without a fault."""

# --- requests and their answers -------------------------------------------------------------------------------------------


class World:
    """The tiny model with three tasks, its engines by placement, the requests of every cell, and their right answers."""

    def __init__(self, folder: Path):
        from faults import task_sources, world_on
        from tiny import tiny_folder

        base, tasks = task_sources(tiny_folder("llama", folder / "base"), folder)
        self._engines = world_on((base, tasks), PLACEMENTS["split"], pages=PAGES)
        self._built: dict[str, Engine] = {"split": self._engines.engine}
        self._draw = np.random.default_rng(15)
        self.cast = self._cast()
        self.ids = {name: self._engines.expected(request).ids for name, request in self.cast.items()}
        self.texts, self.scores = self._without_fault()

    def engine(self, placement: str, fault: Fault, decode_pages: int | None = None) -> Engine:
        """A new engine with points for the fault; programs are compiled once for all."""
        if placement not in self._built:
            self._built[placement] = self._engines.new_engine(placement=PLACEMENTS[placement])
        return watched_engine(self._built[placement], fault, decode_pages)

    def _cast(self) -> dict[str, Request]:
        """Requests of all kinds by name; most share the beginning of their prompt."""
        head = self._draw.integers(0, self._engines.model.config.vocab_size, 22)
        penalties = SamplingParams(repetition_penalty=1.2, presence_penalty=0.3)
        full = self._clear("math", head, 9, 12)
        return {
            "full": full,
            "base": self._clear("chat", head, 5, 14),
            "same task": self._clear("math", head, 7, 20),
            "same prompt": self._clear("lora", full.prompt, 0, 12),
            "penalties": self._clear("lora", (), 13, 16, sampling=penalties),
            "long prompt": self._clear("chat", (), 75, 4),
            "scores": self._clear("lora", head, 12, 4, scores_prompt=True, logprobs=2),
            "begun answer": self._clear("math", head, 10, 10, response_start=24),
        }

    def _clear(self, task: str, head: Any, length: int, max_tokens: int, **fields: Any) -> Request:
        """A request whose prompt begins with `head`, and whose answer has no near-tie."""
        from tiny_engine import MIN_GAP

        for _ in range(100):
            tail = self._draw.integers(0, self._engines.model.config.vocab_size, length)
            request = self._engines.request(task, [*head, *tail], max_tokens, **fields)
            if self._engines.expected(request).smallest_gap >= MIN_GAP:
                return request
        raise AssertionError("every prompt has a near-tie")

    def _without_fault(self) -> tuple[dict[str, str], dict[str, Any]]:
        run = Run(self, Cell("split", "none", "duplicate"))
        run.play()
        assert run.num_wrong == 0
        clients = run.clients.values()
        return {client.name: client.text for client in clients}, {client.name: client.scores for client in clients}


class Client:
    """A request's events, each with the turn and the second of its arrival."""

    def __init__(self, name: str, request: Request):
        self.name, self.request = name, request
        self.events: list[tuple[int, float, Event]] = []
        self.sequence: Sequence | None = None
        self.refused = False

    @property
    def ended(self) -> bool:
        """Whether its last event has arrived, or it was refused."""
        return self.refused or any(event.last for *_, event in self.events)

    @property
    def failed(self) -> bool:
        """Whether it was refused or has ended with an error."""
        return self.refused or any(event.error is not None for *_, event in self.events)

    @property
    def finished(self) -> bool:
        """Whether it has a whole answer."""
        return any(event.finish_reason in ("stop", "length") for *_, event in self.events)

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(event.text for *_, event in self.events)

    @property
    def ids(self) -> list[int]:
        """The tokens that were reported."""
        return [event.token_id for *_, event in self.events if event.token_id is not None]

    @property
    def scores(self) -> list[Any]:
        """The prompt's scores, as often as they were reported."""
        return [event.prompt_logprobs for *_, event in self.events if event.prompt_logprobs]

    @property
    def num_disorders(self) -> int:
        """Events that were shown twice, left out, or followed the last one."""
        counts = [event.completion_tokens for *_, event in self.events if event.token_id is not None]
        last = [event.last for *_, event in self.events]
        wrong = counts != list(range(1, len(counts) + 1))
        return wrong + (not self.refused and last.count(True) != 1) + (True in last[:-1])

    def num_wrong(self, ids: list[int], text: str | None, scores: Any) -> int:
        """Tokens that differ from the right answer, of which a request that failed has the beginning."""
        wrong = sum(ours != right for ours, right in zip(self.ids, ids, strict=False)) + max(
            len(self.ids) - len(ids), 0
        )
        if self.finished:
            wrong += max(len(ids) - len(self.ids), 0)
        if text is not None:
            wrong += self.text != text if self.finished else not text.startswith(self.text)
            wrong += _num_far(self.scores, scores, self.finished)
        return wrong


def _num_far(ours: list[Any], right: list[Any], finished: bool) -> int:
    """Scores that differ; they are reported once."""
    if not ours and not (finished and right):
        return 0
    if len(ours) != len(right):
        return 1
    pairs = zip(ours[0], right[0], strict=True)
    return sum(
        a is not b and (a is None or b is None or a.token_id != b.token_id or abs(a.logprob - b.logprob) > CLOSE)
        for a, b in pairs
    )


# --- runs ---------------------------------------------------------------------------------------------------------------


class Run:
    """Plays one cell."""

    def __init__(self, world: World, cell: Cell):
        self._world, self.cell = world, cell
        self._draw = np.random.default_rng([cell.seed, *cell.stage.encode(), *cell.fault.encode()])
        inject, each_time = FAULTS[cell.fault]
        # Seed 0 takes the first sequence that reaches the stage.
        skip = int(self._draw.integers(4)) if cell.seed and cell.stage != "wake-up" else 0
        self._wake_turn = 4 + int(self._draw.integers(8))
        self.fault = Fault(cell.stage, inject, each_time, skip, self._note_fired)
        self.fault.others = self._turn_of_others
        small = SMALL_POOL if cell.stage in PREEMPTION else None
        self.engine = world.engine(cell.placement, self.fault, small)
        self.clients: dict[str, Client] = {}
        self.touched: set[str] = set()
        self.unexpected: list[str] = []
        self.turn, self.fired_turn, self.fired_at = 0, 0, 0.0
        self.num_deaths: Counter[int] = Counter()
        self._gone: set[int] = set()
        self._inside = False
        requeue = self.engine.admission._requeue
        self.engine.admission._requeue = lambda sequence: (self._touch(sequence), requeue(sequence))[1]  # type: ignore[method-assign]

    def play(self) -> None:
        """Submits all requests, two a turn, and takes turns until all have ended and nothing is held."""
        # Without the reserve the small pool runs dry in every order of arrivals.
        reserve = 0 if self.cell.stage in PREEMPTION else admission.RESERVE_PAGES
        with mock.patch.object(admission, "RESERVE_PAGES", reserve):
            self._play()

    def _play(self) -> None:
        if self.cell.stage in RETURN:
            self._lose_prefilled()
        waiting = list(self._world.cast)
        if self.cell.seed:
            self._draw.shuffle(waiting)
        still = 0
        while waiting or not all(client.ended for client in self.clients.values()):
            for name in waiting[:2]:
                self._submit(name, self._world.cast[name])
            del waiting[:2]
            still = 0 if self._take_turn() else still + 1
            if still > STILL_TURNS:
                self._pass_deadline()
                still = 0
            if self.turn > MOST_TURNS:
                raise AssertionError(f"{self.cell}: still running after {MOST_TURNS} turns")
        self._settle()

    def _lose_prefilled(self) -> None:
        """The decode pools know the beginning of most prompts, the prefill pools have lost it."""
        skip, self.fault.stage = self.fault.stage, "none"
        for index in range(len(self.engine.decode_workers)):
            self._submit(f"earlier {index}", self._world.cast["base"])
            while not self.clients[f"earlier {index}"].ended:
                self._take_turn()
        self._settle()
        for pool in self.engine.admission.prefill_pools:
            pool.manager.flush()
        self.fault.stage = skip

    def _submit(self, name: str, request: Request) -> None:
        client = self.clients[name] = Client(name, dataclasses.replace(request, id=name))
        if self.cell.stage == "submit" and not self.fault.num_fired and len(self.clients) > self.fault.skip:
            self._submit_with_fault(client)
        else:
            self._accept(client)

    def _accept(self, client: Client) -> None:
        point = self.fault.at

        def on_event(event: Event) -> None:
            def note() -> None:
                client.events.append((self.turn, time.perf_counter(), event))

            def fail(error: Exception) -> None:
                note()
                raise error

            owner = [] if client.sequence is None else [client.sequence]
            point(Point("delivery of an event", owner, note, fail))

        try:
            client.sequence = self.engine.submit(client.request, on_event).sequence
        except EngineDown:
            client.refused = True
            self.touched.add(client.request.id)
            return

    def _submit_with_fault(self, client: Client) -> None:
        self.fault.num_fired = 1
        self._note_fired()
        if self.cell.fault == "exception":
            with mock.patch.object(self.engine, "facts", None):
                try:
                    self._accept(client)
                except AttributeError:
                    client.refused = True
            return
        self._accept(client)
        self.fault.victim = client.sequence
        if self.cell.fault == "client gone":
            self.engine.abort(client.request.id)
            return
        again = self.clients[f"{client.name} again"] = Client(
            client.name, dataclasses.replace(client.request, id=f"{client.name} again")
        )
        self._accept(again)

    # --- turns ---------------------------------------------------------------------------------------------------------

    def _take_turn(self) -> bool:
        """One turn of every group of workers, in random order; whether there was anything to do."""
        self.turn += 1
        groups = list(self.engine._groups)
        if self.cell.seed:
            self._draw.shuffle(groups)  # type: ignore[arg-type]
        done = [self._step(group) for group in groups]
        if self.cell.stage == "wake-up" and self.turn == self._wake_turn:
            live = self.engine.live
            self.fault.stage = "wake-up"
            self.fault.at(Point("wake-up", live, lambda: [self._step(group) for group in groups * 2]))
        self.engine.expire()
        return any(done)

    def _turn_of_others(self, store: Any) -> None:
        if self._inside:
            return
        self._inside = True
        for group in self.engine._groups:
            if all(worker.pool.store is not store for worker in (*group.prefill, *group.decode)):
                for _ in range(2):
                    self._step(group)
        self._inside = False

    def _step(self, group: WorkerGroup) -> bool:
        """What a worker's thread does (worker_thread.py)."""
        if id(group) in self._gone:
            return False
        try:
            return group.step()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if not isinstance(error, (Death, Injected, WorkerBroken)):
                self.unexpected.append(repr(error))
            self._die(group)
            return True

    def _die(self, group: WorkerGroup) -> None:
        recovery = self.engine._recovery
        for_good = self.cell.fault.endswith("for good") or self.num_deaths[id(group)] == len(RESTART_SECONDS)
        self.num_deaths[id(group)] += 1
        prefill, decode = ({worker.index for worker in workers} for workers in (group.prefill, group.decode))
        if for_good:
            for sequence in self.engine.live:
                if sequence.prefill_worker in prefill or sequence.decode_worker in decode:
                    self._touch(sequence)
        if recovery.group_died(group, for_good):
            self._gone.add(id(group))
        else:
            recovery.group_restarted(group)

    def _pass_deadline(self) -> None:
        """Time passes until the first deadline of those that stand still."""
        engine = self.engine
        admission = engine.admission
        live = {one: admission._last_progress(one, admission._progress_beside) for one in engine.live}
        if not live:
            raise AssertionError(f"{self.cell}: nothing moves, and no request is live")
        for sequence in live:
            if self._waits_for_victim(sequence):
                self._touch(sequence)
        now = min(live.values()) + engine.config.limits.stall_seconds + 1e-6
        with mock.patch.object(time, "monotonic", return_value=now):
            engine.expire()

    def _waits_for_victim(self, sequence: Sequence) -> bool:
        tables = [held for held in (sequence.prefill.table, sequence.decode.table) if held is not None]
        producers = [one for held in tables for one in held.manager.producers_for(sequence)]
        return any(one is self.fault.victim or getattr(one, "sequence", None) is self.fault.victim for one in producers)

    def _settle(self) -> None:
        for _ in range(STILL_TURNS):
            if self.engine.idle:
                break
            self._take_turn()

    def _note_fired(self) -> None:
        self.fired_turn, self.fired_at = self.turn, time.perf_counter()
        self._touch(self.fault.victim)

    def _touch(self, sequence: Sequence | None) -> None:
        if self.fault.num_fired and sequence is not None:
            self.touched.add(sequence.request.id)

    # --- what came of it -------------------------------------------------------------------------------------------------

    @property
    def victim(self) -> str | None:
        """The id of the request that the fault happened to."""
        refused = [name for name, client in self.clients.items() if client.refused]
        return self.fault.victim.request.id if self.fault.victim is not None else next(iter(refused), None)

    @property
    def num_wrong(self) -> int:
        """Wrong tokens, texts and scores of all requests."""
        world = self._world
        texts, scores = getattr(world, "texts", {}), getattr(world, "scores", {})
        return sum(
            client.num_wrong(world.ids[name], texts.get(name), scores.get(name))
            for client in self.clients.values()
            if (name := client.name) in world.ids
        )

    @property
    def num_lost_pages(self) -> int:
        """Pages that are still held, or in no book."""
        lost = 0
        for pool in self.engine.pools:
            manager = pool.manager
            lost += pool.num_usable - manager.num_free - manager.num_cached
        try:
            self.engine.admission.check()
        except AssertionError as error:
            self.unexpected.append(f"the books: {error}")
            return max(lost, 1)
        return lost

    def result(self) -> dict[str, Any]:
        """The numbers of the cell."""
        victim = self.victim
        touched = self.touched | ({victim} if victim else set())
        failed = {name for name, client in self.clients.items() if client.failed}
        turns, seconds = self._until_known(touched)
        shapes = [worker.compiled for worker in self.engine.workers]
        return {
            **dataclasses.asdict(self.cell),
            "fired": self.fault.num_fired,
            "victim": victim,
            "requests": len(self.clients),
            "wrong_tokens": self.num_wrong,
            "out_of_order": sum(client.num_disorders for client in self.clients.values()),
            "touched": len(touched),
            "failed": len(failed),
            "failed_untouched": len(failed - touched),
            "failed_others": len(failed - {victim}),
            "aborted": sum(
                client.ended and not client.failed and not client.finished for client in self.clients.values()
            ),
            "pages_lost": self.num_lost_pages,
            "deaths": self.num_deaths.total(),
            "shapes_given_up": sum(len(each._given_up) for each in shapes),
            "turns": turns,
            "seconds": round(seconds, 4),
            "unexpected": self.unexpected,
        }

    def _until_known(self, touched: set[str]) -> tuple[int, float]:
        """Turns and seconds from the fault to the next event of the last touched client to hear anything."""
        waits = [(0, 0.0)]
        for name in touched:
            client = self.clients[name]
            later = [(turn, at) for turn, at, _ in client.events if at > self.fired_at]
            ends = [(turn, at) for turn, at, event in client.events if event.last and at > self.fired_at]
            if known := (ends if client.failed else later[:1]):
                waits.append((known[0][0] - self.fired_turn, known[0][1] - self.fired_at))
        return max(waits)


def _raise(error: Exception) -> Any:
    raise error


def play(world: World, cell: Cell) -> dict[str, Any]:
    """The numbers of one cell. If too few requests reach the stage in this order, then those of the fixed order."""
    run = Run(world, cell)
    run.play()
    if not run.fault.num_fired and cell.seed:
        return {**play(world, dataclasses.replace(cell, seed=0)), "seed": cell.seed}
    return run.result()
