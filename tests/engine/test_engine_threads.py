"""The engine with its threads: they serve, wake each other and stop; a dead or stalled thread is unhealthy."""

import threading
import time
from contextlib import contextmanager

import pytest
from fake_engine import Client, make_engine
from serving_fakes import EOS, Echo

from pshare_jax.engine import transfer, worker_thread
from pshare_jax.engine.engine import EngineDown
from pshare_jax.engine.request import FAILED, TIMED_OUT
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
ENDLESS = [120]
PLACES = {"split": {}, "colocated": {"colocated": True}, "two each": {"num_prefill": 2, "num_decode": 2}}


def wait_for(reached, seconds=10.0):
    limit = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < limit, "that does not happen"
        time.sleep(0.001)


def stays(reached, seconds=0.1):
    """Whether it still holds after all threads had the time to go to sleep."""
    time.sleep(seconds)
    return reached()


@contextmanager
def started(fakes):
    fakes.engine.start()
    try:
        yield Client(fakes)
    finally:
        fakes.engine.stop()
    # The threads have ended, so the test's thread may release what the last aborts left.
    fakes.step_until(lambda: fakes.engine.idle)
    fakes.check()


class Stop:
    """Blocks the worker that calls it until the test lets it continue."""

    def __init__(self):
        self._go, self._there = threading.Event(), threading.Event()

    def __call__(self):
        self._there.set()
        assert self._go.wait(20)
        return False

    def reached(self):
        assert self._there.wait(10)

    def go(self):
        self._go.set()


@pytest.mark.parametrize("place", PLACES)
def test_threads_serve_and_stop(place):
    fakes = make_engine({"t": ECHO, "u": Echo("u")}, decode_pages=40, pages=40, **PLACES[place])
    with started(fakes) as client:
        for number in range(40):
            client.ask(prompt=[number % 7] * (number % 13 + 1), task="tu"[number % 2], max_tokens=9)
        wait_for(lambda: all(client.ended(name) for name in client.events))
        assert fakes.engine.healthy
    for name, sequence in client.sequences.items():
        assert client.ids(name) == Echo(sequence.request.task).answer(sequence.request.prompt, 9)
    assert not fakes.engine.healthy


def test_clients_come_and_go_in_many_threads():
    fakes = make_engine({"t": ECHO}, decode_pages=30, pages=30, rows=3)
    with started(fakes) as client:

        def use(first):
            for number in range(12):
                name = f"{first} {number}"
                client.ask(name, [first] * (number + 3), max_tokens=6)
                if number % 3 == 2:
                    fakes.engine.abort(name)
                else:
                    wait_for(lambda name=name: client.ended(name))

        threads = [threading.Thread(target=use, args=(first,)) for first in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, sequence in client.sequences.items():
        right = ECHO.answer(sequence.request.prompt, 6)
        assert client.ids(name) == right[: len(client.ids(name))]
        assert client.end(name) == "length" or int(name.split()[1]) % 3 == 2


# --- a worker's step wakes another worker ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["decodes", "is copied"])
def test_pages_of_an_aborted_request_go_to_who_waits_for_them(where):
    fakes = make_engine({"t": ECHO}, decode_pages=8)
    stop = Stop()
    if where == "decodes":
        fakes.decode["t"].before = stop
    else:
        gate = fakes.hold(1)
        gate.look = stop
    with started(fakes) as client:
        client.ask("a", [1] * 20)
        stop.reached()
        wait_for(lambda: client.state("a") is (State.DECODING if where == "decodes" else State.TRANSFERRING))
        client.ask("b", [2] * 20, max_tokens=2)
        # Its worker releases the pages only later, when the requests that wait for them have already checked.
        fakes.engine.abort("a")
        assert stays(lambda: client.state("b") is State.WAITING)
        stop.go()
        wait_for(lambda: client.ended("b"))


def test_prefill_pages_are_free_as_soon_as_their_answer_begins():
    fakes = make_engine({"t": ENDLESS}, pages=9, decode_pages=60)
    gate = fakes.hold(1)
    with started(fakes) as client:
        client.ask("a", [1] * 29)
        wait_for(lambda: client.sequences["a"].state is State.TRANSFERRING)
        client.ask("b", [2] * 29, max_tokens=2)
        assert stays(lambda: client.state("b") is State.WAITING)
        # Its first step does not end: nothing else wakes the prefill worker.
        stop = fakes.decode["t"].before = Stop()
        gate.open = True
        stop.reached()
        wait_for(lambda: client.state("b") is State.TRANSFERRING)
        stop.go()
        wait_for(lambda: client.ended("b"))


def test_more_copies_than_may_be_on_their_way_at_once():
    """The decode worker sleeps when the first transfer is sent, and the prefill worker cannot continue without it."""
    fakes = make_engine({"t": ECHO}, chunk=4, moves=(1,))
    with started(fakes) as client:
        assert stays(lambda: fakes.engine.idle)
        client.ask("a", [1] * (2 * 4 * transfer.MAX_IN_FLIGHT + 1), max_tokens=3)
        wait_for(lambda: client.ended("a"))
        assert client.ids("a") == ECHO.answer(client.sequences["a"].request.prompt, 3)


def test_pages_of_an_aborted_prefill_go_to_the_answer_that_needs_one():
    # A chunk fills no page, so no transfer wakes the decode worker.
    fakes = make_engine({"t": ECHO}, chunk=3, decode_pages=13)
    with started(fakes) as client:
        first = fakes.decode["t"].before = Stop()
        client.ask("a", [1] * 8, max_tokens=30)
        first.reached()
        stop = fakes.prefill[0].before = Stop()
        client.ask("b", [2] * 24)
        stop.reached()
        first.go()
        wait_for(lambda: len(client.ids("a")) == 13)
        assert stays(lambda: len(client.ids("a")) == 13)
        fakes.engine.abort("b")
        assert stays(lambda: len(client.ids("a")) == 13)
        stop.go()
        wait_for(lambda: client.ended("a"))


def test_who_waited_for_a_copy_that_failed_is_admitted_again(caplog):
    fakes = make_engine({"t": ECHO}, chunk=64, moves=(16,))
    gate = fakes.hold(1, error=RuntimeError("lost on the way"))
    with started(fakes) as client:
        for name in "abc":
            client.ask(name, [1] * 29, max_tokens=2)
        wait_for(lambda: all(client.state(name) is State.TRANSFERRING for name in "abc"))
        fakes.decode_stores[0].gates.clear()
        gate.open = True
        wait_for(lambda: all(client.ended(name) for name in "abc"))
        assert [client.end(name) for name in "abc"] == [FAILED, "length", "length"]


def test_a_copy_that_never_comes_ends_by_its_deadline():
    """Case A3-02, by the engine's watch thread."""
    fakes = make_engine({"t": ECHO}, stall_seconds=0.5)
    fakes.hold(1)
    with started(fakes) as client:
        client.ask("a", [1] * 29)
        client.ask("b", [1] * 29)
        wait_for(lambda: client.ended("a") and client.ended("b"))
        assert [client.end(name) for name in "ab"] == [TIMED_OUT, TIMED_OUT]
        fakes.decode_stores[0].gates.clear()
        wait_for(lambda: fakes.engine.idle)
        client.ask("c", [1] * 29, max_tokens=3)
        wait_for(lambda: client.ended("c"))
        assert client.end("c") == "length"


# --- health ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("side", ["prefill_workers", "decode_workers"])
def test_a_dead_thread_fails_its_requests_and_shows_in_health(side, monkeypatch):
    fakes = make_engine({"t": ENDLESS}, num_decode=2)
    engine, client = fakes.engine, Client(fakes)
    gate = fakes.hold(3)
    engine.start()
    client.ask("runs", (1, 2), max_tokens=200, route=Route(0, 1))
    wait_for(lambda: client.ids("runs"))
    client.ask("is copied", [3] * 9, route=Route(0, 0))
    wait_for(lambda: client.state("is copied") is State.TRANSFERRING)

    def die():
        raise SystemError("dead")

    monkeypatch.setattr(getattr(engine, side)[0], "step", die)
    engine.wake()
    wait_for(lambda: not engine.healthy)
    with pytest.raises(EngineDown):
        client.ask("late")
    if side == "decode_workers":
        wait_for(lambda: client.ended("is copied"))
        assert client.end("is copied") == FAILED
    gate.open = True
    wait_for(lambda: client.ended("runs"))
    wait_for(lambda: client.ended("is copied") or client.ids("is copied"))
    engine.stop()
    # Requests on healthy workers continue.
    assert client.end("runs") == "length"
    assert client.end("is copied") in (FAILED if side == "decode_workers" else "length", "abort")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_for_a_dead_prefill_thread_fails_at_once(monkeypatch):
    fakes = make_engine({"t": ENDLESS}, pages=9, decode_pages=30)
    fakes.hold(1)
    client = Client(fakes)
    fakes.engine.start()
    client.ask("is copied", [1] * 29)
    wait_for(lambda: client.state("is copied") is State.TRANSFERRING)
    client.ask("waits", [2] * 29)

    def die():
        raise SystemError("dead")

    monkeypatch.setattr(fakes.engine.prefill_workers[0], "step", die)
    fakes.engine.wake()
    wait_for(lambda: client.ended("waits"))
    assert client.end("waits") == FAILED
    assert not client.ended("is copied")
    fakes.engine.stop()


def test_a_thread_that_stands_still_is_unhealthy_until_it_goes_on(monkeypatch):
    monkeypatch.setattr(worker_thread, "STALL_SECONDS", 0.3)
    fakes = make_engine({"t": [*b"xyz", EOS]})
    stop = fakes.decode["t"].before = Stop()
    with started(fakes) as client:
        assert stays(lambda: fakes.engine.healthy)
        client.ask("a")
        stop.reached()
        wait_for(lambda: not fakes.engine.healthy)
        # New requests are still accepted: the stalled turn may end.
        client.ask("b")
        stop.go()
        wait_for(lambda: client.ended("a") and client.ended("b"))
        wait_for(lambda: fakes.engine.healthy)
