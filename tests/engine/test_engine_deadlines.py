"""A deadline in every state (cases A3-02, A3-08): requests without progress fail, and no pages stay held."""

import time

import pytest
from fake_engine import Client, make_engine
from serving_fakes import Echo

from pshare_jax.engine import transfer
from pshare_jax.engine.request import TIMED_OUT
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
STALL = 5.0


@pytest.fixture
def clock(monkeypatch):
    """Lets time pass: `clock(seconds)`."""
    real, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed[0])

    def wait(seconds):
        passed[0] += seconds

    return wait


def ask_now(client, name, prompt, **fields):
    """A request that arrived at the clock's time."""
    client.ask(name, prompt, **fields)
    client.sequences[name].progressed = time.monotonic()


def waiting(fakes, client, monkeypatch):
    """Another request holds the decode pool."""
    client.ask("runs", [2] * 30, max_tokens=38)
    client.ask("frozen", [1] * 40)


def prefilling(fakes, client, monkeypatch):
    """A transfer that never arrives blocks the transfers to the decode worker."""
    monkeypatch.setattr(transfer, "MAX_IN_FLIGHT", 1)
    client.ask("runs", [2] * 6, max_tokens=38)
    fakes.step_until(lambda: client.state("runs") is State.DECODING)
    fakes.hold(3)
    client.ask("frozen too", [3] * 9)
    client.ask("frozen", [1] * 9)


def transferring(fakes, client, monkeypatch):
    """A transfer that never arrives."""
    fakes.hold(1)
    client.ask("runs", [2] * 6, max_tokens=38)
    client.ask("frozen", [1] * 30)


def awaiting(fakes, client, monkeypatch):
    """Another request's transfer that never arrives."""
    fakes.hold(1)
    client.ask("runs", [2] * 6, max_tokens=38)
    client.ask("frozen too", [1] * 29)
    client.ask("frozen", [1] * 29)


def decoding(fakes, client, monkeypatch):
    """The only decoding request gets no page for its next token: a transfer that never arrives holds the rest."""
    client.ask("frozen", [1] * 8)
    fakes.step_until(lambda: client.state("frozen") is State.DECODING)
    fakes.hold(3)
    client.ask("frozen too", [3] * 47)


def preempted(fakes, client, monkeypatch):
    """An older request needs the whole pool."""
    client.ask("runs", [2] * 30, max_tokens=38)
    client.ask("frozen", [1] * 20)


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
    fakes = make_engine({"t": ECHO}, decode_pages=18, stall_seconds=STALL)
    client = Client(fakes)
    freeze(fakes, client, monkeypatch)
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
    # Requests with progress continue, and none waits for what is stuck.
    assert client.events.get("frozen too") is None or client.end("frozen too") == TIMED_OUT
    for store in fakes.decode_stores:
        store.gates.clear()
    ask_now(client, "after", [1] * 30, max_tokens=3)
    fakes.run()
    counts = {"runs": 38, "after": 3}
    for name in counts.keys() & client.events.keys():
        assert client.ids(name) == ECHO.answer(client.sequences[name].request.prompt, counts[name])


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
