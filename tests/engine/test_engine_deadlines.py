"""A deadline in every state (cases A3-02, A3-08): requests without progress fail, and no pages stay held."""

import time

import pytest
from fake_engine import Client, make_engine
from serving_fakes import Echo

from pshare_jax.engine import transfer
from pshare_jax.engine.request import TIMED_OUT
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
STALL = 5.0


def ask_now(client, name, prompt, **fields):
    """A request that arrived at the clock's time."""
    client.ask(name, prompt, **fields)
    client.sequences[name].progressed = time.monotonic()


HERE, ELSEWHERE = Route(0, 0), Route(0, 1)


def hang(fakes, monkeypatch):
    """The device of the decode worker never returns from its step."""
    monkeypatch.setattr(fakes.engine.decode_workers[0], "step", lambda: False)


def waiting(fakes, client, monkeypatch):
    """Another request holds the decode pool, for a transfer that never arrives."""
    client.ask("runs", [2] * 6, max_tokens=38, route=ELSEWHERE)
    fakes.hold(3)
    client.ask("frozen too", [3] * 40, route=HERE)
    fakes.step_until(lambda: client.state("frozen too") is State.TRANSFERRING)
    client.ask("frozen", [1] * 40, route=HERE)


def prefilling(fakes, client, monkeypatch):
    """A transfer that never arrives blocks the transfers to the decode worker."""
    monkeypatch.setattr(transfer, "MAX_IN_FLIGHT", 1)
    client.ask("runs", [2] * 6, max_tokens=38, route=HERE)
    fakes.step_until(lambda: client.state("runs") is State.DECODING)
    fakes.hold(3)
    client.ask("frozen too", [3] * 9, route=HERE)
    client.ask("frozen", [1] * 9, route=HERE)


def transferring(fakes, client, monkeypatch):
    """A transfer that never arrives."""
    fakes.hold(1)
    client.ask("runs", [2] * 6, max_tokens=38, route=HERE)
    client.ask("frozen", [1] * 30, route=HERE)


def awaiting(fakes, client, monkeypatch):
    """Another request's transfer that never arrives."""
    fakes.hold(1)
    client.ask("runs", [2] * 6, max_tokens=38, route=HERE)
    client.ask("frozen too", [1] * 29, route=HERE)
    client.ask("frozen", [1] * 29, route=HERE)


def decoding(fakes, client, monkeypatch):
    """The device hangs."""
    client.ask("runs", [2] * 6, max_tokens=38, route=ELSEWHERE)
    client.ask("frozen", [1] * 8, route=HERE)
    fakes.step_until(lambda: len(client.ids("frozen")) == 3)
    hang(fakes, monkeypatch)


def preempted(fakes, client, monkeypatch):
    """An older request needs the whole pool, and its device hangs."""
    client.ask("runs", [2] * 6, max_tokens=38, route=ELSEWHERE)
    client.ask("frozen too", [3] * 30, max_tokens=38, route=HERE)
    client.ask("frozen", [1] * 20, route=HERE)
    fakes.step_until(lambda: client.state("frozen") is State.PREEMPTED)
    hang(fakes, monkeypatch)


WAYS = {
    waiting: State.WAITING,
    prefilling: State.PREFILLING,
    transferring: State.TRANSFERRING,
    awaiting: State.TRANSFERRING,
    decoding: State.DECODING,
    preempted: State.PREEMPTED,
}


@pytest.mark.parametrize("freeze", WAYS)
def test_every_state_has_a_deadline(freeze, clock, monkeypatch):
    fakes = make_engine({"t": ECHO}, num_decode=2, decode_pages=18, stall_seconds=STALL)
    client = Client(fakes)
    with monkeypatch.context() as patch:
        freeze(fakes, client, patch)
        fakes.step_until(lambda: client.state("frozen") is WAYS[freeze])
        fakes.step(12)
        assert client.state("frozen") is WAYS[freeze]
        said = len(client.ids("frozen"))
        seconds = 0
        while not client.ended("frozen"):
            assert seconds <= STALL + 1
            clock(1)
            fakes.step()
            seconds += 1
    assert seconds >= STALL
    assert (client.end("frozen"), len(client.ids("frozen"))) == (TIMED_OUT, said)
    # A retry may help a request that was never admitted.
    assert client.events["frozen"][-1].retry is (True if freeze is waiting else None)
    # Requests with progress continue, and none waits for what is stuck.
    assert client.events.get("frozen too") is None or client.end("frozen too") == TIMED_OUT
    for store in fakes.decode_stores:
        store.gates.clear()
    ask_now(client, "after", [1] * 30, max_tokens=3, route=HERE)
    fakes.run()
    counts = {"runs": 38, "after": 3}
    for name in counts.keys() & client.events.keys():
        assert client.ids(name) == ECHO.answer(client.sequences[name].request.prompt, counts[name])


@pytest.mark.parametrize("state", [State.WAITING, State.PREEMPTED, State.TRANSFERRING])
def test_nobody_is_late_while_something_ahead_moves(state, clock):
    """An older answer has the pages, or the row, for many times as long as the deadline."""
    fakes = make_engine({"t": ECHO}, rows=1 if state is State.TRANSFERRING else 4, decode_pages=18, stall_seconds=STALL)
    client = Client(fakes)
    client.ask("runs", [2] * 30, max_tokens=38)
    fakes.step_until(lambda: client.state("runs") is State.DECODING)
    client.ask("patient", [1] * {State.WAITING: 38, State.PREEMPTED: 20, State.TRANSFERRING: 5}[state], max_tokens=30)
    fakes.step_until(lambda: client.state("patient") is state)
    waited = 0
    while client.state("patient") is state:
        fakes.step()
        clock(STALL - 1)
        waited += 1
    assert waited > 10
    fakes.run()
    assert client.ids("runs") == ECHO.answer([2] * 30, 38)
    assert client.ids("patient") == ECHO.answer(client.sequences["patient"].request.prompt, 30)


def test_a_transfer_that_never_arrives_does_not_hold_up_an_older_answer(clock):
    """The pages that it is to be written into go to the answer that needs them."""
    fakes = make_engine({"t": ECHO}, decode_pages=18, stall_seconds=STALL)
    client = Client(fakes)
    client.ask("runs", [1] * 8, max_tokens=50)
    fakes.step_until(lambda: client.state("runs") is State.DECODING)
    gate = fakes.hold(3)
    client.ask("frozen", [3] * 47, max_tokens=5)
    while not client.ended("runs"):
        fakes.step()
        clock(STALL / 40)
    assert client.ids("runs") == ECHO.answer([1] * 8, 50)
    # Its deadline counts from there, and its transfer is sent again.
    fakes.step(5)
    assert client.state("frozen") is State.TRANSFERRING
    gate.open = True
    fakes.run()
    assert client.ids("frozen") == ECHO.answer([3] * 47, 5)


def test_a_copy_that_never_comes_is_given_up_though_others_wait_for_it(clock):
    """Its request was aborted, so only the waiters' and the transfer's own deadlines can end it."""
    fakes = make_engine({"t": ECHO}, stall_seconds=STALL)
    fakes.hold(1)
    client = Client(fakes)
    client.ask("owner", [1] * 30)
    client.ask("early", [1] * 30, max_tokens=4)
    fakes.step(10)
    fakes.engine.abort("owner")
    fakes.step(2)
    assert fakes.engine.admission.num_adopted == 2
    clock(STALL - 1)
    fakes.engine.step()
    ask_now(client, "late", [1] * 30, max_tokens=4)
    fakes.step(5)
    assert not client.events["early"]
    fakes.decode_stores[0].gates.clear()
    clock(2)
    fakes.run()
    assert client.end("early") == TIMED_OUT
    # The late request computed the pages itself before its own deadline.
    assert client.ids("late") == ECHO.answer([1] * 30, 4)


@pytest.mark.parametrize("colocated", [False, True])
def test_progress_of_any_kind_moves_the_deadline(clock, colocated):
    """Chunks, transfers and tokens are progress: a long request is not stuck."""
    fakes = make_engine({"t": ECHO}, chunk=4, colocated=colocated, stall_seconds=STALL)
    client = Client(fakes)
    client.ask("long", [1] * 60, max_tokens=30)
    steps = 0
    while not client.ended("long"):
        fakes.step()
        clock(STALL - 1)
        steps += 1
    assert steps > 40
    assert client.ids("long") == ECHO.answer([1] * 60, 30)


def test_who_comes_nearer_to_its_turn_is_not_given_up(clock):
    """The choices of one large call wait for each other for longer than the deadline."""
    fakes = make_engine({"t": ECHO}, pages=24, stall_seconds=STALL)
    client = Client(fakes)
    names = [client.ask(prompt=[number] * 30, max_tokens=30) for number in range(12)]
    for _ in range(20_000):
        if fakes.engine.idle:
            break
        fakes.engine.step()
        clock(STALL / 40)
    assert [client.end(name) for name in names] == ["length"] * len(names)
    fakes.check()


def test_an_end_before_its_time_tells_what_was_made():
    fakes = make_engine({"t": ECHO})
    client = Client(fakes)
    name = client.ask(prompt=[1] * 9, max_tokens=30)
    fakes.step_until(lambda: len(client.ids(name)) == 3)
    fakes.engine.abort(name)
    last = client.events[name][-1]
    assert (last.finish_reason, last.completion_tokens) == ("abort", 3)
    fakes.run()


def test_who_comes_and_goes_behind_does_not_keep_a_request_waiting(clock):
    """A worker hangs; requests that give up must not move the deadline of requests queued before them."""
    fakes = make_engine({"t": ECHO}, pages=24, stall_seconds=STALL)
    fakes.hold(1)
    client = Client(fakes)
    client.ask("holds", [1] * 60, max_tokens=10)
    fakes.step(5)
    client.ask("patient", [2] * 60, max_tokens=10)
    fakes.step(5)
    assert client.state("patient") is State.WAITING
    for number in range(20):
        ask_now(client, f"short {number}", [3] * 9)
        fakes.step(2)
        fakes.engine.abort(f"short {number}")
        clock(STALL / 10)
        if client.ended("patient"):
            break
    assert client.end("patient") == TIMED_OUT


def test_deadlines_of_nested_prompts_are_checked_in_a_moment(clock):
    """Each waits for the pages of all before it."""
    fakes = make_engine({"t": ECHO}, pages=512, chunk=64, rows=16, stall_seconds=STALL)
    fakes.hold(1)
    client = Client(fakes)
    names = [client.ask(prompt=list(range(1, 4 * number + 2)), max_tokens=3) for number in range(1, 31)]
    fakes.step(60)
    assert sum(client.sequences[name].decode.table is not None for name in names) > 20
    clock(STALL + 1)
    began = time.process_time()
    fakes.engine.expire()
    assert time.process_time() - began < 1
    for store in fakes.decode_stores:
        store.gates.clear()
    fakes.run()
