"""Aborts in every state: immediate for the client, pages released within two steps, other requests unaffected."""

import pytest
from fake_engine import Client, make_engine
from serving_fakes import Echo

from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
LONG = [1] * 41


def waiting(fakes, client):
    client.ask("a", LONG)


def prefilling(fakes, client):
    client.ask("a", LONG)
    fakes.step_until(lambda: client.sequences["a"].prefill.num_prefilled == 32)


def transferring(fakes, client):
    fakes.hold(1)
    client.ask("a", LONG)
    fakes.step_until(lambda: client.state("a") is State.TRANSFERRING)


def decoding(fakes, client):
    client.ask("a", LONG)
    fakes.step_until(lambda: len(client.ids("a")) == 3)


def preempted(fakes, client):
    """An older request outgrows the pool."""
    client.ask("old", [2] * 40, max_tokens=32)
    client.ask("a", [1] * 20)
    fakes.step_until(lambda: client.state("a") is State.PREEMPTED)


STATES = {
    State.WAITING: waiting,
    State.PREFILLING: prefilling,
    State.TRANSFERRING: transferring,
    State.DECODING: decoding,
    State.PREEMPTED: preempted,
}


# Without transfers, none can be held back.
CASES = [(state, colocated) for state in STATES for colocated in (False, True) if state is not State.TRANSFERRING]


@pytest.mark.parametrize(("state", "colocated"), [*CASES, (State.TRANSFERRING, False)])
def test_an_aborted_request_is_gone_within_two_steps(state, colocated):
    fakes = make_engine({"t": ECHO}, decode_pages=19, pages=19, colocated=colocated)
    client = Client(fakes)
    STATES[state](fakes, client)
    assert client.state("a") is state
    others = [name for name in client.events if name != "a"]
    steps = len(fakes.prefill[0].chunks), fakes.decode["t"].inputs.count(1)
    fakes.engine.abort("a")
    assert client.end("a") == "abort"
    assert fakes.engine.num_live == len(others)
    fakes.step(2)
    # No device call was made for it, and it holds nothing.
    assert (len(fakes.prefill[0].chunks), fakes.decode["t"].inputs.count(1)) == steps
    gone = client.sequences["a"]
    assert (gone.state, gone.prefill.table, gone.decode.table) == (State.ABORTED, None, None)
    if not others:
        assert fakes.engine.idle
    fakes.check()
    for store in fakes.decode_stores:
        store.gates.clear()
    client.ask("b", LONG, max_tokens=3)
    fakes.run()
    assert client.ids("b") == ECHO.answer(LONG, 3)
    for name in others:
        assert client.ids(name) == ECHO.answer([2] * 40, 32)


def test_abort_after_every_number_of_steps():
    for steps in range(24):
        fakes = make_engine({"t": ECHO}, chunk=8)
        fakes.decode_stores[0].gates[2] = fakes.hold(1, polls=steps % 5)
        client = Client(fakes)
        client.ask("a", [1] * 30, max_tokens=9)
        client.ask("b", [2] * 30, max_tokens=9)
        fakes.step(steps)
        ended = client.ended("a")
        fakes.engine.abort("a")
        fakes.run()
        assert client.end("a") == ("length" if ended else "abort"), steps
        assert client.ids("b") == ECHO.answer([2] * 30, 9), steps


def test_a_copy_on_its_way_is_not_written_into_pages_that_were_given_back():
    """Case A3-01: the pages go to the next request at once; the transfer arrives later."""
    fakes = make_engine({"t": ECHO}, decode_pages=8)
    gate = fakes.hold(1)
    client = Client(fakes)
    client.ask("a", [1] * 24)
    fakes.step_until(lambda: client.state("a") is State.TRANSFERRING)
    held = client.sequences["a"].decode.table
    assert held is not None
    pages = set(held.pages)
    client.ask("b", [2] * 24, max_tokens=4)
    fakes.engine.abort("a")
    gate.open = True
    fakes.step_until(lambda: client.state("b") is State.DECODING)
    held = client.sequences["b"].decode.table
    assert held is not None
    assert pages & set(held.pages)
    fakes.run()
    assert client.ids("b") == ECHO.answer([2] * 24, 4)


def test_abort_behind_a_busy_worker_does_not_wait_for_it():
    fakes = make_engine({"t": ECHO})
    client = Client(fakes)
    client.ask("runs", (1, 2, 3), max_tokens=50)
    fakes.step(5)
    client.ask("queued")
    fakes.engine.abort("queued")
    assert client.end("queued") == "abort"
    assert not client.ended("runs")


def test_abort_all_ends_everything_in_every_state():
    fakes = make_engine({"t": ECHO}, decode_pages=19)
    fakes.hold(3)
    client = Client(fakes)
    client.ask("decodes", [2] * 5)
    fakes.step(3)
    client.ask("is copied", [3] * 30)
    fakes.step(3)
    client.ask("waits", [4] * 41)
    fakes.step(1)
    states = {client.state(name) for name in client.events}
    assert states == {State.DECODING, State.TRANSFERRING, State.WAITING}
    fakes.engine.abort_all()
    assert {client.end(name) for name in client.events} == {"abort"}
    fakes.step(2)
    assert fakes.engine.idle
    fakes.check()


def test_unknown_and_ended_ids_are_ignored():
    fakes = make_engine({"t": ECHO})
    client = Client(fakes)
    client.ask("a", max_tokens=1)
    fakes.run()
    for name in ("a", "nobody"):
        fakes.engine.abort(name)
    assert client.end("a") == "length"


def test_an_abort_from_within_an_event_ends_it_there():
    """A client may disconnect at any moment, also while its event is being sent."""
    fakes = make_engine({"t": ECHO})
    client = Client(fakes)
    client.ask("a")
    events = client.events["a"]
    sequence = client.sequences["a"]

    def on_event(event):
        events.append(event)
        if len(events) == 2:
            fakes.engine.abort("a")

    sequence.on_event = on_event
    fakes.run()
    assert client.end("a") == "abort"
    assert len(client.ids("a")) == 2
