"""Pipelined decode steps (engine/decode) over fakes: what is sent and fetched for a step, late ends, and late failures."""

import functools
from typing import Any

import numpy as np
import pytest
from fake_engine import Client, make_engine
from serving_fakes import EOS, Echo, FakePending

from pshare_jax.engine.request import FAILED
from pshare_jax.engine.sequence import State
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.sampling.params import SamplingParams

pytestmark = pytest.mark.host
ECHO, OTHER = Echo("t"), Echo("u")


class Traffic:
    """What goes to and from the decode worker's device: bytes of each step, page tables, and the order of it all."""

    def __init__(self, fakes, monkeypatch):
        self.num_bytes, self.tables, self.events = [], 0, []
        store = fakes.decode_stores[0]
        self._run, self._put = store.run, store.put_table
        monkeypatch.setattr(store, "run", self.run)
        monkeypatch.setattr(store, "put_table", self.put_table)
        fetch, traffic = FakePending.fetch, self

        def fetched(pending):
            traffic.events.append("fetch")
            return fetch(pending)

        monkeypatch.setattr(FakePending, "fetch", fetched)

    def run(self, step, params, tokens, rows):
        if isinstance(tokens, DecodeBatch):
            self.events.append("dispatch")
            sent = [tokens.slots, tokens.context_lens, tokens.new_pages, tokens.adapters, *(tokens.shared or ())]
            self.num_bytes.append(sum(array.nbytes for array in sent))
        return self._run(step, params, tokens, rows)

    def put_table(self, tables, slot, pages):
        self.tables += 1
        return self._put(tables, slot, pages)


@pytest.mark.parametrize("pipelined", [True, False])
def test_a_step_sends_a_few_bytes_a_row_and_fetches_the_step_before(pipelined, monkeypatch):
    sent = []
    for length in (100, 3900):
        fakes = make_engine(
            {"t": ECHO}, page_size=16, pages=1100, chunk=512, moves=(8, 32), rows=4, debug=False, pipelined=pipelined
        )
        client = Client(fakes)
        traffic = Traffic(fakes, monkeypatch)
        names = [client.ask(prompt=[number] * length, max_tokens=60) for number in range(4)]
        fakes.run()
        assert [client.ids(name) for name in names] == [ECHO.answer([number] * length, 60) for number in range(4)]
        # A whole page table is sent once a sequence.
        assert traffic.tables == 4
        sent.append(max(traffic.num_bytes))
        flying = np.cumsum([1 if event == "dispatch" else -1 for event in traffic.events])
        assert (max(flying), min(flying), flying[-1]) == (2 if pipelined else 1, 0, 0)
        # Nothing is in flight only when there was nothing to dispatch.
        idle = int((flying == 0).sum())
        assert idle <= len(names) if pipelined else idle == len(flying) / 2
        monkeypatch.undo()
    assert sent[0] == sent[1] <= 4 * 4 * 6


@pytest.mark.parametrize("colocated", [False, True])
def test_an_end_that_is_seen_late_costs_one_token(colocated):
    for script, fields, dropped in [
        ([*b"xyz", EOS], {}, 5),
        ([*b"xyz"], {"stop": ("yz",)}, 5),
        ([*b"xyz"], {"max_tokens": 7}, 0),
        ([*b"xyz", EOS], {"max_tokens": 4}, 0),
    ]:
        events = []
        for pipelined in (False, True):
            fakes = make_engine({"t": script}, colocated=colocated, rows=2, pipelined=pipelined)
            client = Client(fakes)
            names = [client.ask(prompt=[number] * 9, **fields) for number in range(5)]
            fakes.run()
            fakes.step()
            (worker,) = fakes.engine.decode_workers
            assert worker.num_dropped == (dropped if pipelined else 0)
            assert worker.num_tokens == sum(len(client.ids(name)) for name in names)
            events.append([client.events[name] for name in names])
        assert events[0] == events[1]


def test_groups_take_turns_while_the_others_step_runs():
    """Two groups have one step each in flight, never two of one group, and all have as many tokens."""
    fakes = make_engine({"t": ECHO, "u": OTHER}, rows=2)
    client = Client(fakes)
    names = [client.ask(prompt=[3] * 5, task=task, max_tokens=40) for task in "tu"]
    fakes.step_until(lambda: all(len(client.ids(name)) > 5 for name in names))
    for _ in range(20):
        fakes.step()
        counts = [len(client.ids(name)) for name in names]
        assert abs(counts[0] - counts[1]) <= 1
    fakes.run()
    assert [client.ids(name) for name in names] == [ECHO.answer([3] * 5, 40), OTHER.answer([3] * 5, 40)]


@pytest.mark.parametrize("colocated", [False, True])
def test_a_step_that_fails_late_is_blamed_and_not_the_step_after(colocated, caplog):
    fakes = make_engine({"t": ECHO, "u": OTHER}, colocated=colocated, rows=2)
    client = Client(fakes)
    (worker,) = fakes.engine.decode_workers
    others = [client.ask(prompt=[number] * 9, task="u", max_tokens=30) for number in range(2)]
    client.ask("fails", [250] * 9, max_tokens=30)
    failed, watched = [], worker.watch.failed
    worker.watch.failed = lambda failure: failed.append(failure) or watched(failure)
    fakes.decode["t"].fail_at, fakes.decode["t"].fail_late = 4, True
    fakes.run()
    assert client.end("fails") == FAILED
    # What was generated before the failure is reported, once.
    assert client.ids("fails") == ECHO.answer([250] * 9, 4)
    assert [event.completion_tokens for event in client.events["fails"]] == [1, 2, 3, 4, 4]
    assert {sequence.request.id for failure in failed for sequence in failure.sequences} == {"fails"}
    assert [place for failure in failed for _, place in failure.places] == [13] * len(failed)
    for number, name in enumerate(others):
        assert client.ids(name) == OTHER.answer([number] * 9, 30)


@pytest.mark.parametrize("order", ["decode first", "prefill first"])
def test_the_first_failed_step_of_a_colocated_pool_is_blamed(order, caplog):
    """Each of a chunk and a decode step in flight is computed from the arrays of the other."""
    fakes = make_engine({"t": ECHO}, colocated=True, chunk=8, rows=2)
    client = Client(fakes)
    client.ask("decodes", [1] * 5, max_tokens=20)
    fakes.step_until(lambda: len(client.ids("decodes")) == 3)
    (worker,), (prefill,) = fakes.engine.decode_workers, fakes.engine.prefill_workers
    blamed = []
    for each in (worker, prefill):
        watched = each.watch.failed
        each.watch.failed = lambda failure, watched=watched: blamed.append(failure.kind) or watched(failure)
    guilty: Any = fakes.decode["t"] if order == "decode first" else fakes.prefill[0]
    guilty.fail_late = True
    client.ask("long", [2] * 40, max_tokens=3)
    if order == "decode first":
        guilty.fail_at = 4
        fakes.step_until(lambda: guilty.fail_at is None or bool(blamed))
        guilty.fail_at = None
    else:
        guilty.fail_on = 2
        fakes.step_until(lambda: bool(blamed))
        guilty.fail_on = None
    assert blamed == ["decode" if order == "decode first" else "prefill"]
    fakes.run()
    assert client.ids("decodes") == ECHO.answer([1] * 5, 20)
    assert client.ids("long") == ECHO.answer([2] * 40, 3)


def test_what_a_preempted_answer_keeps_is_what_was_reported():
    """Its tokens in flight are reported before its pages are saved: else its KV would be ahead of its tokens."""
    fakes = make_engine({"t": ECHO}, decode_pages=15)
    client = Client(fakes)
    names = [client.ask(prompt=[number] * 21, max_tokens=30) for number in range(2)]
    (worker,) = fakes.engine.decode_workers
    preempt = worker._preempt

    def checked(sequence):
        assert not worker._in_flight
        preempt(sequence)

    worker._preempt = checked
    fakes.run()
    assert worker.num_preempted > 0
    assert [client.ids(name) for name in names] == [ECHO.answer([number] * 21, 30) for number in range(2)]


def test_an_aborted_answer_gets_no_token_of_the_step_in_flight():
    fakes = make_engine({"t": ECHO}, rows=1)
    client = Client(fakes)
    first = client.ask(prompt=[1] * 9, max_tokens=30)
    second = client.ask(prompt=[2] * 9, max_tokens=30)
    fakes.step_until(lambda: len(client.ids(first)) == 4)
    fakes.engine.abort(first)
    made, events = len(client.ids(first)), len(client.events[first])
    fakes.run()
    assert (client.state(first), len(client.ids(first)), len(client.events[first])) == (State.ABORTED, made, events)
    assert client.ids(second) == ECHO.answer([2] * 9, 30)


def test_choices_that_end_at_different_steps_keep_their_tokens_apart():
    """Slots go from row to row while steps that wrote them are in flight."""
    answers = []
    for pipelined in (False, True):
        fakes = make_engine({"t": ECHO}, rows=3, pages=200, pipelined=pipelined)
        client = Client(fakes)
        ask = functools.partial(client.ask, max_tokens=40)
        names = [
            ask(prompt=[number] * (3 + number % 7), sampling=SamplingParams(choice=1 + number % 11))
            for number in range(30)
        ]
        fakes.run()
        answers.append([client.events[name] for name in names])
    assert answers[0] == answers[1]
