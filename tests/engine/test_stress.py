"""Everything at once on a real engine: small pools, late transfers, aborts, mixed tasks, shared prefixes, salts, sampling.

Every finished answer must be the oracle's, every aborted one its beginning, and no page may be left over.
"""

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import (
    Counters,
    Sent,
    assert_restored,
    faulty_engine,
    has_waiters,
    pools_of,
    random_turn,
    store_of,
    task_sources,
    world_on,
)
from tiny import VOCAB
from tiny_engine import MIN_GAP, Answer, Engines

from pshare_jax.engine import admission
from pshare_jax.engine.config import Placement, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Request
from pshare_jax.engine.sequence import State
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.share.generate import Rollout

TASKS = ("chat", "math", "lora")
PREFIX_LENGTHS = (40, 33, 25, 12)
SPLIT = placed([[0]], [[1]])
SMALL = {"prefill_pages": 26, "decode_pages": 20}
ABORTS = {"any": 0.01, "prefilling": 0.4, "in flight": 0.02, "awaited": 0.05}
"""Probability of an abort in each turn: of any request; of a request in prefill that others await; of a request with a
transfer in flight; of a request with a transfer that others await."""


@dataclass
class Asked:
    """A request, its arrival, and its expected answer."""

    request: Request
    expected: Rollout
    turn: int
    answer: Answer = field(init=False)


@dataclass
class Plan:
    """Requests in order of arrival, in waves with idle moments between them; each prompt for several tasks."""

    world: Engines
    draw: np.random.Generator
    asked: list[Asked] = field(default_factory=list)
    turn: int = 0

    def __post_init__(self) -> None:
        self.prefixes = [self.draw.integers(0, VOCAB, length) for length in PREFIX_LENGTHS]

    def fill(self, count: int) -> "Plan":
        """Draws `count` requests."""
        while len(self.asked) < count:
            self._burst()
        return self

    def crowd(self, count: int) -> list[Asked]:
        """Draws `count` answers of 12 pages each, for one moment: two of them do not fit into a small decode pool."""
        first = len(self.asked)
        while len(self.asked) < first + count:
            request = self.world.request("chat", self.draw.integers(0, VOCAB, 9), 37)
            expected = self.world.expected(request)
            if expected.smallest_gap >= MIN_GAP:
                self.asked.append(Asked(request, expected, self.turn))
        return self.asked[first:]

    def _burst(self) -> None:
        draw = self.draw
        self.turn += int(draw.integers(0, 4)) if draw.random() < 0.85 else 400
        prefix = self.prefixes[draw.integers(len(self.prefixes))]
        kept = prefix[: draw.integers(1, len(prefix) + 1)] if draw.random() < 0.3 else prefix
        prompt = [*kept, *draw.integers(0, VOCAB, draw.integers(0, 9))]
        salt = "other" if draw.random() < 0.15 else ""
        for _ in range(draw.integers(1, 5)):
            self.turn += int(draw.random() < 0.2)
            self._ask(prompt, salt)

    def _ask(self, prompt: list[int], salt: str) -> None:
        for _ in range(20):
            request = self.world.request(
                TASKS[self.draw.integers(len(TASKS))],
                prompt,
                int(self.draw.integers(1, 15)),
                sampling=self._sampling(),
                stop_ids=frozenset(range(12)) if self.draw.random() < 0.3 else frozenset(),
                cache_salt=salt,
            )
            expected = self.world.expected(request)
            if expected.smallest_gap >= MIN_GAP:
                self.asked.append(Asked(request, expected, self.turn))
                return

    def _sampling(self) -> SamplingParams:
        kind = self.draw.random()
        if kind < 0.5:
            return SamplingParams()
        drawn: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": int(self.draw.integers(1000))}
        penalties: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
        return SamplingParams(**(drawn if kind < 0.8 else penalties))


@dataclass
class Storm:
    """Plays a plan on an engine, turn by turn, with random aborts; checks lists each turn and pools when idle."""

    engine: Engine
    plan: Plan
    draw: np.random.Generator
    faults: float = 0.0
    """Probability that a step or a transfer fails, each turn."""
    aborts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ABORTS, 0))
    num_idle: int = 0

    def play(self) -> None:
        waiting, live, turn = list(self.plan.asked), [], 0
        for _ in range(20_000):
            if not waiting and not live:
                break
            if not live and waiting and waiting[0].turn > turn:
                turn = self._idle(waiting[0].turn)
            while waiting and waiting[0].turn <= turn:
                asked = waiting.pop(0)
                asked.answer = Answer(self.engine, asked.request)
                live.append(asked)
            random_turn(self.engine, self.draw)
            self.engine.admission.check()
            self._abort(live)
            self._break()
            live = [entry for entry in live if not entry.answer.ended]
            turn += 1
        assert not waiting
        assert not live
        self._idle(turn)

    def _idle(self, turn: int) -> int:
        assert_restored(self.engine)
        self.num_idle += 1
        return turn

    def _abort(self, live: list[Asked]) -> None:
        sequences = [entry.answer.sequence for entry in live]
        sending = [each for each in sequences if self.engine.admission.transfers_of(each) and not each.final]
        awaited = [each for each in sending if has_waiters(each)]
        prefilling = [each for each in sequences if each.state is State.PREFILLING and has_waiters(each)]
        for kind, able in zip(ABORTS, (sequences, prefilling, sending, awaited), strict=True):
            if able and self.draw.random() < ABORTS[kind]:
                self.engine.abort(able[self.draw.integers(len(able))].request.id)
                self.aborts[kind] += 1

    def _break(self) -> None:
        if self.draw.random() >= self.faults:
            return
        pools = pools_of(self.engine)
        store = store_of(pools[self.draw.integers(len(pools))])
        sending = [late for pool in pools for late in store_of(pool).late[-4:]]
        kind = self.draw.integers(3)
        if kind == 0:
            store.fault = RuntimeError("a step fails")
        elif kind == 1:
            store.place_fault = RuntimeError("a copy cannot be sent")
        elif sending:
            sending[self.draw.integers(len(sending))].error = RuntimeError("a copy fails")


def check_answers(plan: Plan) -> None:
    """Finished answers equal the oracle's, and aborted answers are its beginning."""
    for asked in plan.asked:
        answer = asked.answer
        assert answer.sequence.final
        whole = asked.expected.ids
        expected = whole if answer.sequence.state is State.FINISHED else whole[: len(answer.ids)]
        assert answer.ids == expected, (asked.request, answer.sequence.state)


def storm(
    world: Engines, seed: int, count: int, caplog: Any, faults: float = 0.0, **pools: Any
) -> tuple[Counters, Sent, Storm]:
    """Plays `count` requests with this seed and checks everything but the counters."""
    draw = np.random.default_rng(seed)
    late = np.random.default_rng([seed, 1])
    engine = faulty_engine(world, polls=lambda: int(late.integers(0, 12)), **pools)
    sent = Sent(engine)
    played = Storm(engine, Plan(world, draw).fill(count), draw, faults)
    with caplog.at_level(logging.ERROR, logger="pshare_jax"):
        played.play()
    assert faults or not caplog.records, caplog.text
    # What a fault ends starts again, unless it fails too often.
    assert faults or State.FAILED not in engine.num_ended
    check_answers(played.plan)
    assert played.num_idle > 2
    for pool in pools_of(engine):
        pool.manager.flush()
        assert pool.manager.num_free == pool.num_usable
    counters = Counters.of(engine)
    print(counters, engine.num_ended, f"delta={sent.num_delta}", played.aborts, f"idle={played.num_idle}")
    return counters, sent, played


def world_of(sources: tuple[Path, dict[str, Any]], placement: Placement = SPLIT, **plan: Any) -> Engines:
    return world_on(sources, placement, debug=True, **plan)


def assert_split_troubles(counters: Counters, sent: Sent, played: Storm) -> None:
    """A run proves little unless all of this has happened; a long run must also have lost pages that others awaited."""
    assert counters.restarts > 0 or len(played.plan.asked) < 500
    assert counters.preemptions > 0
    assert counters.evictions > 0
    assert counters.waits > 0
    assert counters.inherited > 0
    assert counters.transfers > 0
    assert sent.num_delta > 0
    assert played.aborts["in flight"] + played.aborts["awaited"] > 0


def assert_colocated_troubles(counters: Counters, sent: Sent, played: Storm) -> None:
    """The same without transfers."""
    assert counters.restarts > 0 or len(played.plan.asked) < 500
    assert counters.preemptions > 0
    assert counters.evictions > 0
    assert counters.waits > 0
    assert sent.copies == []
    assert played.aborts["prefilling"] > 0


def test_storm(sources, caplog):
    met = storm(world_of(sources), 13, 60, caplog, **SMALL)
    assert_split_troubles(*met)


def test_colocated_storm(sources, caplog):
    world = world_of(sources, placed([[1]], [[1]]))
    assert_colocated_troubles(*storm(world, 12, 60, caplog, prefill_pages=24))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
def test_long_storm(sources, caplog, seed):
    met = storm(world_of(sources), seed, 500, caplog, **SMALL)
    assert_split_troubles(*met)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("routing", ["prefix", "round_robin"])
def test_storm_over_two_and_two_workers(sources, caplog, routing):
    world = world_of(sources, placed([[0], [2]], [[1], [3]]), routing=routing)
    met = storm(world, 5, 500, caplog, prefill_pages=18, decode_pages=20)
    assert_split_troubles(*met)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_storm_over_workers_that_share_devices_crosswise(sources, caplog):
    """Each pool receives transfers from the other pair's prefill worker, and shares its own pair's pages."""
    world = world_of(sources, placed([[0], [1]], [[1], [0]]))
    met = storm(world, 8, 500, caplog, prefill_pages=22)
    assert_split_troubles(*met)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_long_colocated_storm(sources, caplog):
    world = world_of(sources, placed([[1]], [[1]]))
    assert_colocated_troubles(*storm(world, 6, 500, caplog, prefill_pages=24))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("decode", [1, 0], ids=["split", "colocated"])
def test_isolated_storm(sources, caplog, decode):
    world = world_of(sources, placed([[0]], [[decode]]), sharing="isolated")
    pages = {"prefill_pages": 18, "decode_pages": 20} if decode else {"prefill_pages": 18}
    counters, _, _ = storm(world, 7, 500, caplog, **pages)
    assert counters.evictions > 0
    assert counters.preemptions > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("family", "changes", "pools"),
    [
        # Pages of 8: fewer of them, so that running answers still run out.
        ("qwen3", {"page_size": 8, "chunk": 24}, {**SMALL, "decode_pages": 12}),
        ("gemma3", {"page_size": 3}, SMALL),
        ("llama", {"pipelined": False}, SMALL),
    ],
)
def test_storm_of_other_models(tiny_folders, tmp_path, caplog, family, changes, pools):
    sources = task_sources(tiny_folders[family], tmp_path)
    met = storm(world_of(sources, **changes), 9, 500, caplog, **pools)
    assert_split_troubles(*met)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("placement", [SPLIT, placed([[0], [1]], [[1], [0]])], ids=["split", "crosswise"])
def test_storm_with_failing_steps_and_copies(sources, caplog, placement):
    counters, _, _ = storm(world_of(sources, placement), 10, 500, caplog, faults=0.03, **SMALL)
    # Not evictions: a pool that was rebuilt counts them anew.
    assert counters.preemptions > 0
    assert counters.waits > 0
    assert counters.restarts > 0
    assert counters.inherited > 0


# --- with threads -----------------------------------------------------------------------------------------------------


def threaded_storm(world: Engines, seed: int, count: int, limit: float, **pools: Any) -> tuple[Engine, Plan]:
    """Submits requests to a started engine, some at a time, while another thread aborts a fifth; all must end in time."""
    draw, late = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    engine = faulty_engine(world, polls=lambda: int(late.integers(0, 12)), **pools)
    plan = Plan(world, draw).fill(count)
    to_abort: queue.Queue[tuple[str, float] | None] = queue.Queue()
    aborter = threading.Thread(target=_abort_each, args=(engine, to_abort))
    engine.start()
    aborter.start()
    try:
        deadline = time.monotonic() + limit
        for asked in plan.asked:
            _wait(engine, lambda: engine.num_live < 12, deadline)
            with engine.lock:
                asked.answer = Answer(engine, asked.request)
            if draw.random() < 0.2:
                to_abort.put((asked.request.id, float(draw.random()) * 0.02))
        _wait(engine, lambda: engine.idle, deadline)
        # Whether the requests above ever fill the pool depends on the device's speed; these do, on any.
        crowd = plan.crowd(4)
        with engine.lock:
            for asked in crowd:
                asked.answer = Answer(engine, asked.request)
        _wait(engine, lambda: engine.idle, deadline)
        with engine.lock:
            engine.admission.check()
    finally:
        to_abort.put(None)
        aborter.join()
        engine.stop()
    return engine, plan


def _wait(engine: Engine, condition: Callable[[], bool], deadline: float) -> None:
    while not condition():
        if time.monotonic() > deadline:
            states = [(sequence.request.id, sequence.state) for sequence in engine.live]
            raise AssertionError(f"the engine stands still: {states}")
        time.sleep(0.001)


def _abort_each(engine: Engine, to_abort: queue.Queue) -> None:
    while (given := to_abort.get()) is not None:
        name, delay = given
        time.sleep(delay)
        engine.abort(name)


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns 500 times as often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def check_threaded(world: Engines, seed: int, count: int, caplog: Any, **pools: Any) -> None:
    engine, plan = threaded_storm(world, seed, count, 150, **pools)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text
    check_answers(plan)
    counters = Counters.of(engine)
    print(counters, engine.num_ended)
    assert counters.preemptions > 0
    assert counters.transfers > 0
    assert engine.num_ended[State.ABORTED] > 0
    assert engine.num_ended[State.FINISHED] > 0
    assert State.FAILED not in engine.num_ended


@pytest.mark.timeout(240)
def test_threaded_storm(sources, caplog, restless, monkeypatch):
    # So that running answers run out of pages more often.
    monkeypatch.setattr(admission, "RESERVE_PAGES", 0)
    check_threaded(world_of(sources), 3, 60, caplog, **SMALL)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "placement",
    [SPLIT, placed([[0], [2]], [[1], [3]]), placed([[0], [1]], [[1], [0]])],
    ids=["split", "two and two", "crosswise"],
)
def test_long_threaded_storm(sources, caplog, restless, placement):
    check_threaded(world_of(sources, placement), 4, 500, caplog, **SMALL)
