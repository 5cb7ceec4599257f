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


def test_an_answer_takes_the_pages_of_a_younger_prompt_in_the_middle_of_its_step():
    # A chunk fills no page, so no transfer wakes the decode worker.
    fakes = make_engine({"t": ECHO}, chunk=3, decode_pages=13)
    with started(fakes) as client:
        first = fakes.decode["t"].before = Stop()
        client.ask("a", [1] * 8, max_tokens=30)
        first.reached()
        stop = fakes.prefill[0].before = Stop()
        client.ask("b", [2] * 24, max_tokens=5)
        stop.reached()
        first.go()
        wait_for(lambda: client.ended("a"))
        # The prompt's step has not ended, and what it still writes harms nobody.
        assert client.state("b") in (State.WAITING, State.PREFILLING)
        stop.go()
        wait_for(lambda: client.ended("b"))
    assert client.ids("a") == ECHO.answer([1] * 8, 30)
    assert client.ids("b") == ECHO.answer([2] * 24, 5)


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
        assert [client.ids(name) for name in "abc"] == [ECHO.answer([1] * 29, 2)] * 3
        assert fakes.engine.transfers[0].stats.failures == 1


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


def dying(monkeypatch, worker, times=1_000_000):
    """The worker's step raises so many times from now on; returns the times that are left."""
    step, left = worker.step, [times]

    def die():
        if left[0] > 0:
            left[0] -= 1
            raise SystemError("dead")
        return step()

    monkeypatch.setattr(worker, "step", die)
    return left


def check_answer(client, name, count):
    assert client.end(name) == "length"
    assert client.ids(name) == ECHO.answer(client.sequences[name].request.prompt, count)
    assert [event.completion_tokens for event in client.events[name]] == list(range(1, count + 1))


@pytest.mark.parametrize("place", [{"num_decode": 2}, {"num_prefill": 2, "num_decode": 2, "colocated": True}])
@pytest.mark.parametrize("side", ["prefill_workers", "decode_workers"])
def test_a_dead_thread_is_restarted_and_its_requests_finish(side, place, monkeypatch, caplog):
    monkeypatch.setattr(worker_thread, "RESTART_SECONDS", (0.5,))
    fakes = make_engine({"t": ECHO}, pages=256, **place)
    engine, last = fakes.engine, len(fakes.prefill) - 1
    gate = fakes.hold(3)
    with started(fakes) as client:
        # Its own workers live; but for the prefill worker in the first place.
        client.ask("runs", (1, 2), max_tokens=200, route=Route(last, 1))
        wait_for(lambda: client.ids("runs"))
        client.ask("on the dead worker", [3] * 9, max_tokens=200, route=Route(0, 0))
        wait_for(lambda: client.state("on the dead worker") is State.TRANSFERRING or place.get("colocated"))
        left = dying(monkeypatch, getattr(engine, side)[0], 1)
        engine.wake()
        wait_for(lambda: not engine.healthy)
        assert left == [0]
        # New requests are accepted, for workers that live.
        client.ask("late", (4, 5), max_tokens=5)
        if side == "decode_workers" or last:
            assert client.sequences["late"].decode_worker == 1 or side == "prefill_workers"
            assert client.sequences["late"].prefill_worker == last
            wait_for(lambda: client.ended("late"))
            assert not engine.healthy
        gate.open = True
        wait_for(lambda: engine.healthy)
        wait_for(lambda: all(client.ended(name) for name in client.events))
        assert not engine.broken
    check_answer(client, "runs", 200)
    check_answer(client, "on the dead worker", 200)
    check_answer(client, "late", 5)
    assert [record.getMessage() for record in caplog.records] == ["a worker thread failed"]


@pytest.mark.parametrize("side", ["prefill_workers", "decode_workers"])
def test_requests_of_a_worker_that_stays_dead_move_to_another(side, monkeypatch, caplog):
    monkeypatch.setattr(worker_thread, "RESTART_SECONDS", (0.0, 0.01))
    fakes = make_engine({"t": ECHO}, num_prefill=2, num_decode=2, pages=256)
    engine = fakes.engine
    gate = fakes.hold(3)
    with started(fakes) as client:
        client.ask("elsewhere", (1, 2), max_tokens=200, route=Route(1, 1))
        client.ask("decodes", (7, 2), max_tokens=200, route=Route(0, 0))
        wait_for(lambda: client.ids("decodes"))
        client.ask("is copied", [3] * 9, max_tokens=20, route=Route(0, 0))
        wait_for(lambda: client.state("is copied") is State.TRANSFERRING)
        dying(monkeypatch, getattr(engine, side)[0])
        engine.wake()
        wait_for(lambda: len(caplog.records) == 3)
        gate.open = True
        wait_for(lambda: all(client.ended(name) for name in client.events))
        client.ask("late", (4, 5), max_tokens=5)
        wait_for(lambda: client.ended("late"))
        assert not engine.healthy
        assert not engine.broken
    counts = {"elsewhere": 200, "decodes": 200, "is copied": 20, "late": 5}
    for name, count in counts.items():
        check_answer(client, name, count)
        sequence = client.sequences[name]
        if side == "decode_workers":
            assert sequence.decode_worker == 1
        elif name != "decodes":
            # A decoding answer needs its prefill worker no longer.
            assert sequence.prefill_worker == 1
    assert {record.getMessage() for record in caplog.records} == {"a worker thread failed"}


def test_a_worker_whose_pool_cannot_be_rebuilt_stays_dead(monkeypatch, caplog):
    fakes = make_engine({"t": ECHO}, num_decode=2, pages=256)
    engine = fakes.engine

    def no_memory():
        raise MemoryError

    with started(fakes) as client:
        client.ask("moves", (7, 2), max_tokens=200, route=Route(0, 0))
        wait_for(lambda: client.ids("moves"))
        with monkeypatch.context() as patch:
            patch.setattr(fakes.decode_stores[0], "reset", no_memory)
            dying(patch, engine.decode_workers[0], 1)
            engine.wake()
            wait_for(lambda: client.ended("moves"))
        assert not engine.healthy
        assert not engine.broken
    check_answer(client, "moves", 200)
    assert client.sequences["moves"].decode_worker == 1


@pytest.mark.parametrize("side", ["prefill_workers", "decode_workers"])
def test_without_another_worker_requests_fail_at_once_and_the_engine_is_broken(side, monkeypatch, caplog):
    monkeypatch.setattr(worker_thread, "RESTART_SECONDS", ())
    fakes = make_engine({"t": ECHO}, pages=256, stall_seconds=1000.0)
    engine = fakes.engine
    fakes.hold(3)
    with started(fakes) as client:
        stop = Stop()
        client.ask("decodes", (7, 2), max_tokens=200)
        wait_for(lambda: client.ids("decodes"))
        fakes.decode["t"].before = stop if side == "prefill_workers" else fakes.decode["t"].before
        client.ask("is copied", [3] * 9, max_tokens=20)
        wait_for(lambda: client.state("is copied") is State.TRANSFERRING or side == "prefill_workers")
        dying(monkeypatch, getattr(engine, side)[0])
        engine.wake()
        wait_for(lambda: client.ended("is copied"))
        last = client.events["is copied"][-1]
        assert (last.error, last.retry) == (FAILED, True)
        wait_for(lambda: engine.broken)
        assert not engine.healthy
        with pytest.raises(EngineDown, match="'t' are dead"):
            client.ask("late")
        stop.go()
        wait_for(lambda: client.ended("decodes"))
    if side == "prefill_workers":
        check_answer(client, "decodes", 200)
    else:
        assert (client.end("decodes"), client.events["decodes"][-1].retry) == (FAILED, True)


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
