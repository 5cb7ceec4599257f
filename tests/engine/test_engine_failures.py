"""Failures of every kind: which requests fail, which survive, and that the pools are intact afterwards."""

import pytest
from fake_engine import Client, make_engine
from serving_fakes import EOS, Echo, Gate

from pshare_jax.engine import scoring
from pshare_jax.engine.request import FAILED
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
FAIL = 250
"""A step that reads this token fails."""


def check_answer(client, name, count):
    sequence = client.sequences[name]
    assert client.end(name) == "length"
    assert client.ids(name) == ECHO.answer(sequence.request.prompt, count)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_failed_decode_step_fails_everyone_with_pages_in_that_pool(caplog):
    fakes = make_engine({"t": ECHO}, num_decode=2, rows=1, pages=64, decode_pages=16)
    client = Client(fakes)
    gate = fakes.hold(3)
    requests = {
        "fails": (FAIL, 0),
        "shares the pool": (2, 0),
        "is on its way there": (3, 0),
        "queued": (4, 0),
        "elsewhere": (5, 1),
    }
    for name, (token, decode) in requests.items():
        client.ask(name, [token] * (30 if name == "queued" else 10), max_tokens=8, route=Route(0, decode))
    fakes.step(4)
    assert [client.state(name) for name in requests] == [
        State.DECODING,
        State.DECODING,
        State.TRANSFERRING,
        State.WAITING,
        State.DECODING,
    ]
    old = fakes.engine.decode_workers[0].pool.manager
    fakes.decode["t"].fail_on = FAIL
    fakes.step_until(lambda: client.ended("fails"))
    fakes.decode["t"].fail_on = None
    gate.open = True
    fakes.run()
    assert [client.end(name) for name in requests] == [FAILED, FAILED, FAILED, "length", "length"]
    check_answer(client, "queued", 8)
    check_answer(client, "elsewhere", 8)
    pool = fakes.engine.decode_workers[0].pool
    assert pool.generation == 1
    assert pool.manager is not old
    assert (fakes.engine.decode_workers[1].pool.generation, fakes.engine.prefill_workers[0].pool.generation) == (0, 0)
    assert len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None


def test_preempted_requests_survive_a_failed_decode_step(caplog):
    fakes = make_engine({"t": ECHO}, decode_pages=13)
    client = Client(fakes)
    client.ask("old", [2] * 20, max_tokens=28)
    client.ask("young", [1] * 20, max_tokens=10)
    fakes.step_until(lambda: client.state("young") is State.PREEMPTED)
    fakes.decode["t"].fail_on = 2
    fakes.step()
    assert client.end("old") == FAILED
    assert client.state("young") is State.PREEMPTED
    fakes.run()
    check_answer(client, "young", 10)


def test_a_failed_prefill_step_fails_everyone_with_pages_in_that_pool(caplog):
    fakes = make_engine({"t": ECHO}, num_prefill=2, pages=20, decode_pages=64, chunk=8)
    client = Client(fakes)
    client.ask("decodes", [2] * 10, max_tokens=30, route=Route(0, 0))
    fakes.step_until(lambda: client.state("decodes") is State.DECODING)
    fakes.prefill[0].fail_on = FAIL
    client.ask("fails", [3] * 20 + [FAIL] * 21, route=Route(0, 0))
    client.ask("shares the pool", [4] * 30, route=Route(0, 0))
    client.ask("queued", [5] * 30, max_tokens=8, route=Route(0, 0))
    client.ask("elsewhere", [6] * 30, max_tokens=8, route=Route(1, 0))
    fakes.run()
    ends = [client.end(name) for name in ("fails", "shares the pool")]
    assert ends == [FAILED, FAILED]
    check_answer(client, "decodes", 30)
    check_answer(client, "queued", 8)
    check_answer(client, "elsewhere", 8)
    pools = [worker.pool.generation for worker in (*fakes.engine.prefill_workers, *fakes.engine.decode_workers)]
    assert pools == [1, 0, 0]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("length", [10, 17, 40, 70])
def test_a_prefill_step_that_fails_after_its_dispatch_gives_no_wrong_answer(length, caplog):
    """Devices report late: the next steps and transfers are dispatched by then, computed from missing content."""
    fakes = make_engine({"t": ECHO}, chunk=8)
    fakes.prefill[0].fail_on, fakes.prefill[0].fail_late = FAIL, True
    client = Client(fakes)
    client.ask("fails", [3] * 8 + [FAIL] * (length - 8))
    client.ask("beside it", [4] * 40, max_tokens=8)
    fakes.run()
    fakes.prefill[0].fail_on = None
    assert client.end("fails") == FAILED
    if client.end("beside it") != FAILED:
        check_answer(client, "beside it", 8)
    for name, prompt in (("again", [3] * 8 + [FAIL] * (length - 8)), ("another", [4] * 40)):
        client.ask(name, prompt, max_tokens=8)
        fakes.run()
        check_answer(client, name, 8)
    assert fakes.engine.decode_workers[0].pool.generation == 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_failed_step_of_a_colocated_pool(side, late, caplog):
    """Both workers lose their pages, and neither stumbles over what the other's failure left behind."""
    fakes = make_engine({"t": ECHO}, colocated=True, chunk=8)
    client = Client(fakes)
    client.ask("decodes", [2] * 10)
    fakes.step_until(lambda: client.state("decodes") is State.DECODING)
    if side == "prefill":
        fakes.prefill[0].fail_on, fakes.prefill[0].fail_late = FAIL, late
    else:
        fakes.decode["t"].fail_on = FAIL
    client.ask("fails", [3] * 3 + [FAIL] * 5)
    fakes.step_until(lambda: client.ended("fails"))
    fakes.prefill[0].fail_on = fakes.decode["t"].fail_on = None
    assert {client.end(name) for name in client.events} == {FAILED}
    client.ask("after", [4] * 60, max_tokens=8)
    fakes.run()
    check_answer(client, "after", 8)
    assert fakes.engine.prefill_workers[0].pool.generation == 1


def test_nothing_of_a_failed_pool_is_hit_again(caplog):
    fakes = make_engine({"t": ECHO})
    client = Client(fakes)
    prompt = [*range(20), FAIL]
    client.ask("before", prompt, max_tokens=2)
    fakes.run()
    fakes.decode["t"].fail_on = FAIL
    client.ask("fails", prompt)
    fakes.run()
    fakes.decode["t"].fail_on = None
    client.ask("after", prompt, max_tokens=5)
    fakes.run()
    # The prefill pool is intact: it still has the prompt, which is transferred once more.
    assert [client.cached(name) for name in ("before", "after")] == [0, 20]
    assert fakes.engine.transfers[0].stats.num_pages == 10
    check_answer(client, "after", 5)


def test_erased_pages_are_those_that_nobody_holds():
    fakes = make_engine({"t": ECHO}, decode_pages=12)
    client = Client(fakes)
    for number in range(6):
        client.ask(prompt=[number] * 9, max_tokens=9)
    fakes.run()
    assert fakes.decode_stores[0].num_filled > 0
    for name in client.events:
        check_answer(client, name, 9)


# --- transfers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["gathered", "placed", "arrived"])
def test_a_failed_transfer_fails_only_its_request(when, caplog, monkeypatch):
    fakes = make_engine({"t": ECHO})
    client = Client(fakes)
    if when == "placed":
        fakes.decode_stores[0].refused.add(FAIL)
    elif when == "arrived":
        fakes.hold(FAIL, polls=3, error=RuntimeError("lost on the way"))
    else:
        take = fakes.prefill_stores[0].gather
        fakes.prefill_stores[0].gather = lambda ids: take(ids if 1 not in ids else [])
        monkeypatch.setattr(fakes.prefill_stores[0], "_check_ids", lambda ids: ids[0])
    client.ask("fails", [FAIL] * 30)
    for number in range(3):
        client.ask(prompt=[number] * 30, max_tokens=8)
    fakes.run()
    assert client.end("fails") == FAILED
    for name in client.events.keys() - {"fails"}:
        check_answer(client, name, 8)
    assert fakes.engine.transfers[0].stats.failures == 1
    assert [worker.pool.generation for worker in fakes.engine.decode_workers] == [0]
    assert len(caplog.records) == 1
    # The same request may be submitted again.
    fakes.decode_stores[0].refused.clear()
    fakes.decode_stores[0].gates.clear()
    if when != "gathered":
        client.ask("again", [FAIL] * 30, max_tokens=8)
        fakes.run()
        check_answer(client, "again", 8)


def test_the_first_of_several_copies_fails(caplog):
    fakes = make_engine({"t": ECHO}, chunk=8)
    store = fakes.decode_stores[0]
    store.gates = {1: Gate(polls=5, error=RuntimeError("lost on the way")), 2: Gate(polls=1)}
    client = Client(fakes)
    client.ask("fails", [1] * 8 + [2] * 8 + [3] * 30)
    client.ask("other", [4] * 30, max_tokens=8)
    fakes.run()
    assert client.end("fails") == FAILED
    check_answer(client, "other", 8)


def test_what_was_said_before_the_failure_stays_said(caplog):
    fakes = make_engine({"t": [*b"xy", EOS]}, chunk=64)
    client = Client(fakes)
    client.ask("a")
    client.ask("b", (2, 3))
    fakes.step_until(lambda: client.text("a") == client.text("b") == "x")
    fakes.decode["t"].fail_at = 1
    fakes.run()
    assert [client.end(name) for name in "ab"] == [FAILED, FAILED]
    assert [client.text(name) for name in "ab"] == ["x", "x"]
    assert [event.completion_tokens for event in client.events["a"]] == [1, 1]


def test_a_step_whose_first_run_fails_is_not_used():
    """For example out of memory: smaller steps continue, and the last shape of a kind is kept."""
    fakes = make_engine({"t": [*b"xy", EOS]}, chunk=64)
    client = Client(fakes)
    (worker,), (decoder,) = fakes.engine.prefill_workers, fakes.engine.decode_workers
    worker.compiled.limit([(1, 16), (1, 64)])
    decoder.compiled.limit([(1,), scoring.SHAPE])

    def no_memory():
        raise MemoryError

    fakes.prefill[0].before = fakes.decode["t"].before = no_memory
    assert (worker.warm_up(), decoder.warm_up()) == (True, True)
    assert ((1, 16) in worker.compiled, (1, 64) in worker.compiled) == (False, True)
    assert ((1,) in decoder.compiled, scoring.SHAPE in decoder.compiled) == (True, True)
    fakes.prefill[0].before = fakes.decode["t"].before = lambda: None
    name = client.ask(prompt=[1] * 9)
    fakes.run()
    assert client.text(name) == "xy"


def fails(sequence):
    raise KeyError(sequence.request.task)


def test_a_failing_end_callback_affects_no_request(caplog):
    fakes = make_engine({"t": [*b"xy", EOS]})
    client = Client(fakes)
    fakes.engine.on_end.append(fails)
    names = [client.ask(prompt=[number]) for number in range(3)]
    fakes.engine.abort(names[0])
    fakes.run()
    assert [client.text(name) for name in names] == ["", "xy", "xy"]
    assert "a callback failed" in caplog.text
