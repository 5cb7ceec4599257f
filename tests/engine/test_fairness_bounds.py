"""The bounds that schedule.py and admission.py promise, under random arrivals on the fakes; device calls are the clock."""

import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from fake_engine import Call, Client, Fakes, Load, make_engine, watch_calls
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from serving_fakes import Echo

from pshare_jax.engine import scoring
from pshare_jax.engine.request import Hint
from pshare_jax.engine.sequence import Sequence, State
from pshare_jax.engine.shapes import pages_for

pytestmark = pytest.mark.host

TASKS = {name: Echo(name) for name in "tuv"}
PLACES: dict[str, dict[str, Any]] = {
    "split": {},
    "colocated": {"colocated": True},
    "two to one": {"num_prefill": 2},
    "two to two": {"num_prefill": 2, "num_decode": 2},
}
# A failing example is not shrunk: that takes minutes.
QUICK = settings(deadline=None, max_examples=15, phases=(Phase.explicit, Phase.reuse, Phase.generate))


@dataclass(frozen=True)
class Arrival:
    """A request that arrives so many turns after the one before; `kind` is a stream, scores or a prefetch."""

    turns: int
    kind: str
    task: str
    length: int
    max_tokens: int
    shared: int


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        turns=st.sampled_from([0, 0, 1, 3, 10]),
        kind=st.sampled_from(["stream", "stream", "scores", "prefetch"]),
        task=st.sampled_from("tuv"),
        length=st.sampled_from([1, 3, 9, 17, 30, 60]),
        max_tokens=st.sampled_from([1, 2, 10, 40]),
        shared=st.sampled_from([0, 0, 8, 25]),
    ),
    min_size=1,
    max_size=25,
)


@dataclass
class Since:
    """What a decode worker did since a sequence's last token, or since it joined."""

    table: Any
    num_tokens: int
    calls: int = 0
    most_rows: int = 0
    groups: frozenset[int] = frozenset()


class World:
    """An engine under random arrivals; after each step `check` proves the bounds of every decode worker."""

    def __init__(self, fakes: Fakes):
        self.fakes, self.client, self.admission = fakes, Client(fakes), fakes.engine.admission
        self.prefill_calls = [watch_calls(store) for store in fakes.prefill_stores]
        colocated = fakes.decode_stores is fakes.prefill_stores
        self.decode_calls = self.prefill_calls if colocated else [watch_calls(store) for store in fakes.decode_stores]
        self.aside: set[Sequence] = set()
        self.num_aside = 0
        self._since: list[dict[Sequence, Since]] = [{} for _ in self.decode_calls]
        self._could_admit: list[Sequence | None] = [None for _ in self.prefill_calls]
        self._ended: list[Sequence] = []
        fakes.engine.on_end.append(self._ended.append)
        put_aside = self.admission.put_aside

        def put(sequence: Sequence) -> None:
            self.aside.add(sequence)
            self.num_aside += 1
            put_aside(sequence)

        self.admission.put_aside = put

    def ask(self, arrival: Arrival, number: int) -> None:
        # A prompt of one token has nothing to score: its turn has no call.
        scores, length = arrival.kind == "scores", max(arrival.length, 2)
        shared = [250] * min(arrival.shared, length - 1)
        prompt = [*shared, *[number % 250] * (length - len(shared))]
        fields: dict[str, Any] = {"logprobs": 0, "scores_prompt": True} if scores else {}
        fields |= {"hint": Hint(prefetch=True)} if arrival.kind == "prefetch" else {}
        self.client.ask(prompt=prompt, task=arrival.task, max_tokens=arrival.max_tokens, **fields)

    def play(self, arrivals: list[Arrival], load: Load | None = None, turns: int = 5000) -> None:
        """Submits all, beside a load that ends with the last arrival, and steps until all have ended."""
        for number, arrival in enumerate(arrivals):
            for _ in range(arrival.turns):
                self.step()
                if load is not None:
                    load.ask_again()
            self.ask(arrival, number)
        for _ in range(turns):
            if self.fakes.engine.idle:
                break
            self.step()
        self.fakes.check()
        assert self.fakes.engine.idle
        for name, sequence in self.client.sequences.items():
            request = sequence.request
            if request.prefetches:
                assert (self.client.end(name), self.client.ids(name)) == ("stop", [])
                continue
            assert self.client.end(name) == "length"
            assert self.client.ids(name) == TASKS[request.task].answer(request.prompt, request.max_tokens)

    def step(self) -> None:
        before = [len(calls) for calls in self.decode_calls], [len(calls) for calls in self.prefill_calls]
        num_aside = self.num_aside
        self._ended.clear()
        live = self.fakes.engine.live
        self._had = {s: self._num_made(s) for s in live}
        self._scored = {s for s in live if s.state is State.DECODING and not s.decode.opened}
        could_decode = [self._could_decode(worker) for worker in range(len(self.decode_calls))]
        could_prefill = [set(self.admission.ready_to_prefill(worker)) for worker in range(len(self.prefill_calls))]
        self.fakes.engine.step()
        for worker, calls in enumerate(self.decode_calls):
            new = [call for call in calls[before[0][worker] :] if call.kind != "prefill"]
            assert len(new) <= 1
            assert new or not could_decode[worker] or self.num_aside > num_aside, "a decode worker idles"
            self._check_waits(worker, len(new))
        for worker, calls in enumerate(self.prefill_calls):
            new = [call for call in calls[before[1][worker] :] if call.kind == "prefill"]
            still = could_prefill[worker] & set(self.admission.ready_to_prefill(worker))
            assert new or not still, "a prefill worker idles"
            self._check_admission(worker, new)
        self._check_pages()

    def _num_made(self, sequence: Sequence) -> int:
        """Its tokens of dispatched steps."""
        worker = self.fakes.engine.decode_workers[sequence.decode_worker]
        return worker._groups.num_tokens(sequence) - len(sequence.request.prompt)

    def _could_decode(self, worker: int) -> bool:
        admission = self.admission
        in_flight = {transfer.sequence for transfer in admission.in_flight[worker]}
        arrived = [
            sequence
            for sequence in admission.arriving[worker]
            if sequence not in in_flight and not admission.decode_pools[worker].manager.waiting(sequence)
            if not sequence.request.prefetches
        ]
        decoding = [sequence for sequence in admission.decoding[worker] if not sequence.decode.finishing]
        return any(not s.final and not s.must_restart for s in (*decoding, *arrived))

    def _check_waits(self, worker: int, num_calls: int) -> None:
        """Between two tokens every other group has one turn, and scoring one."""
        decoding = [s for s in self.admission.decoding[worker] if s.decode.opened and s.decode.has_row and not s.final]
        decoding = [sequence for sequence in decoding if not sequence.decode.finishing]
        rows, old = Counter(sequence.group for sequence in decoding), self._since[worker]
        # A sequence may join and end in one turn.
        groups = frozenset(rows).union(s.group for s in self._ended if s.decode_worker == worker)
        new = self._since[worker] = {}
        for sequence in decoding:
            num_tokens, table = self._num_made(sequence), sequence.decode.table
            since = old.get(sequence)
            if since is None or since.table is not table:
                since = Since(table, self._had.get(sequence, 0), -num_calls if sequence in self._scored else 0)
            new[sequence] = since
            since.groups |= groups
            since.most_rows = max(since.most_rows, rows[sequence.group])
            if num_tokens > since.num_tokens:
                new[sequence] = Since(table, num_tokens, 0, rows[sequence.group], frozenset(rows))
                continue
            since.calls += num_calls
            turns = pages_for(since.most_rows, self.admission.max_rows)
            assert since.calls <= len(since.groups) + turns - 1, (since, rows)

    def _check_pages(self) -> None:
        """No page is held by a younger request while an older one of that pool is put aside."""
        self.aside = {s for s in self.aside if s.state in (State.WAITING, State.PREEMPTED)}
        for sequence in self.aside:
            pool = self.admission.decode_pools[sequence.decode_worker]
            younger = [s for s in self.admission.holders(pool) if s.number > sequence.number and not s.final]
            assert not younger, (sequence.request.id, [(s.request.id, s.state) for s in younger])

    def _check_admission(self, worker: int, calls: list[Call]) -> None:
        """A prefill worker without a prompt has no waiting request that has room, for longer than a turn."""
        admission = self.admission
        idle = not calls and not admission.prefilling[worker]
        oldest = next(iter(admission.waiting[worker]), None)
        found = oldest if idle and oldest and self._has_room(oldest) else None
        assert found is None or found is not self._could_admit[worker], "a request that has room is not admitted"
        self._could_admit[worker] = found

    def _has_room(self, sequence: Sequence) -> bool:
        admission = self.admission
        pool, target = admission.prefill_pools[sequence.prefill_worker], admission.decode_pools[sequence.decode_worker]
        if any(other.number < sequence.number for other in admission.refused[sequence.decode_worker]):
            return False
        in_group = [
            s
            for s in (*admission.arriving[sequence.decode_worker], *admission.decoding[sequence.decode_worker])
            if s.group == sequence.group and not s.request.prefetches
        ]
        needed = pages_for(sequence.num_tokens + 1, pool.page_size)
        return (
            len(in_group) < admission.max_rows
            and target.manager.num_available >= needed + len(admission.holders(target))
            and pool.manager.num_available >= needed
        )


def check_decode(arrivals: list[Arrival], place: str, rows: int, chunk: int, pages: int, num_clients: int) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SCORE_TOKENS", 5)
        world = World(make_engine(TASKS, rows=rows, chunk=chunk, pages=pages, **PLACES[place]))
        world.play(arrivals, Load(world.client, num_clients, task="u", max_tokens=1))
        return world


@QUICK
@given(
    arrivals=ARRIVALS,
    place=st.sampled_from(sorted(PLACES)),
    rows=st.sampled_from([1, 2, 4]),
    chunk=st.sampled_from([4, 16, 64]),
    pages=st.sampled_from([30, 45, 200]),
    num_clients=st.sampled_from([0, 0, 3, 7]),
)
def test_waits_of_decoding_sequences_pages_and_work(arrivals, place, rows, chunk, pages, num_clients):
    check_decode(arrivals, place, rows, chunk, pages, num_clients)


# --- prefill -----------------------------------------------------------------------------------------------------------


def check_prefill(lengths: list[tuple[int, int]], chunk: int, place: str) -> None:
    """Requests of (turns, length) with pages and rows for all; every short prompt waits for what it may wait for alone."""
    fakes = make_engine({"t": TASKS["t"]}, chunk=chunk, rows=64, pages=2000, **PLACES[place])
    client, calls = Client(fakes), [watch_calls(store) for store in fakes.prefill_stores]
    arrived: list[int] = []
    for number, (turns, length) in enumerate(lengths):
        fakes.step(turns)
        name = client.ask(prompt=[number] * (length + 1), max_tokens=2)
        worker = client.sequences[name].prefill_worker
        arrived.append(len([call for call in calls[worker] if call.kind == "prefill"]))
    fakes.run()
    for each in calls:
        prefills = [call for call in each if call.kind == "prefill"]
        for number in {row[0] for call in prefills for row in call.rows}:
            if lengths[number][1] <= chunk:
                _check_wait(prefills, arrived[number], number, chunk, [length for _, length in lengths])


def _check_wait(calls: list[Call], arrived: int, number: int, chunk: int, lengths: list[int]) -> None:
    left = dict(enumerate(lengths))
    num_long = short_slots = 0
    for index, call in enumerate(calls):
        if any(row[0] == number for row in call.rows):
            break
        first = call.rows[0][0]
        if index >= arrived:
            short = left[first] <= chunk
            assert first < number or not short, "a younger short prompt went first"
            num_long += not short
            short_slots += call.num_slots * short
        for row in call.rows:
            left[row[0]] -= len(row)
    assert num_long <= 2 + short_slots // chunk


@QUICK
@given(
    lengths=st.lists(
        st.tuples(st.sampled_from([0, 0, 1, 5]), st.sampled_from([1, 3, 7, 16, 17, 40, 64, 65, 300])),
        min_size=1,
        max_size=40,
    ),
    chunk=st.sampled_from([8, 16, 64]),
    place=st.sampled_from(sorted(PLACES)),
)
def test_a_short_prompt_waits_for_two_long_chunks_and_a_queue_of_equals(lengths, chunk, place):
    check_prefill(lengths, chunk, place)


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("num_clients", [1, 4, 16])
@pytest.mark.parametrize("length", [3, 16])
def test_long_prompts_get_half_of_the_tokens_beside_a_flood_of_short_prompts(num_clients, length, colocated):
    fakes = make_engine(TASKS, chunk=16, pages=800, rows=16, colocated=colocated)
    client, calls = Client(fakes), watch_calls(fakes.prefill_stores[0])
    load = Load(client, num_clients, length=length + 1, task="u", max_tokens=1)
    for _ in range(20):
        load.ask_again()
        fakes.step()
    calls.clear()
    long = client.ask("long", [5] * 1200, max_tokens=1)
    while client.sequences[long].prefill.num_left or not client.sequences[long].admitted:
        load.ask_again()
        fakes.step()
    slots = Counter({True: 0, False: 0})
    for call in calls:
        slots[call.kind == "prefill" and call.rows[0][0] == 5] += call.num_slots * (call.kind == "prefill")
    assert slots[True] >= 0.48 * slots.total()
    fakes.run()


# --- deadlines and order -------------------------------------------------------------------------------------------------

STALL = 5.0


def check_deadlines(arrivals: list[Arrival], place: str, rows: int, pages: int, seed: int) -> World:
    """The clock advances by up to just under the deadline in every turn, and nobody is late."""
    draw, passed = random.Random(seed), 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SCORE_TOKENS", 5)
        patch.setattr(time, "monotonic", lambda: passed)
        fakes = make_engine(TASKS, rows=rows, chunk=8, pages=pages, stall_seconds=STALL, **PLACES[place])
        step = fakes.engine.step

        def later() -> bool:
            nonlocal passed
            passed += draw.choice([0.0, 0.3, 0.99]) * STALL
            return step()

        fakes.engine.step = later
        world = World(fakes)
        world.play(arrivals)
        return world


@QUICK
@given(
    arrivals=ARRIVALS,
    place=st.sampled_from(sorted(PLACES)),
    rows=st.sampled_from([1, 4]),
    pages=st.sampled_from([30, 45, 200]),
    seed=st.integers(0, 1000),
)
def test_nobody_is_late_while_something_ahead_moves(arrivals, place, rows, pages, seed):
    check_deadlines(arrivals, place, rows, pages, seed)


def ideal(arrived: list[int], rows: int, max_tokens: int) -> list[int]:
    """The turns in which equal requests would end if the oldest that have arrived decoded together, `rows` at a time."""
    left, ends, turn = [max_tokens] * len(arrived), [0] * len(arrived), 0
    while any(left):
        ready = [index for index, since in enumerate(arrived) if since <= turn and left[index]]
        for index in ready[:rows]:
            left[index] -= 1
            ends[index] = turn + 1
        turn += 1
    return ends


@QUICK
@given(
    turns=st.lists(st.sampled_from([0, 0, 0, 1, 5, 20]), min_size=1, max_size=24),
    rows=st.sampled_from([1, 2, 4]),
    max_tokens=st.sampled_from([20, 40]),
    colocated=st.booleans(),
)
def test_equal_requests_end_on_average_within_a_tenth_of_first_come_first_served(turns, rows, max_tokens, colocated):
    check_order(turns, rows, max_tokens, colocated)


def check_order(turns: list[int], rows: int, max_tokens: int, colocated: bool) -> None:
    fakes = make_engine({"t": TASKS["t"]}, rows=rows, chunk=64, pages=600, colocated=colocated)
    client, now = Client(fakes), 0
    arrived: dict[str, int] = {}
    ended: dict[str, int] = {}

    def step() -> None:
        nonlocal now
        fakes.step()
        now += 1
        ended.update({name: now for name in arrived if name not in ended and client.ended(name)})

    for number, wait in enumerate(turns):
        for _ in range(wait):
            step()
        arrived[client.ask(prompt=[number] * 9, max_tokens=max_tokens)] = now
    while len(ended) < len(turns):
        step()
    times = list(arrived.values())
    best = sum(ideal(times, rows, max_tokens)) - sum(times)
    # An end is seen a turn after its step was dispatched.
    assert sum(ended[name] - 1 - arrived[name] for name in arrived) <= 1.1 * best
