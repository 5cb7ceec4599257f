"""Failures of every kind: only a guilty request fails, the others are answered whole, and the pools are intact afterwards."""

import numpy as np
import pytest
from fake_engine import Client, make_engine
from serving_fakes import EOS, TOKEN, Echo, Gate

from pshare_jax.engine import scoring
from pshare_jax.engine.failures import MAX_ACCUSED, RequestBanned
from pshare_jax.engine.request import FAILED
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
FAIL = 250
"""A step that reads this token fails."""


def check_answer(client, name, count):
    """The whole answer was reported, each token once."""
    sequence = client.sequences[name]
    assert client.end(name) == "length"
    assert client.ids(name) == ECHO.answer(sequence.request.prompt, count)
    assert [event.completion_tokens for event in client.events[name]] == list(range(1, count + 1))
    assert [event.token_id for event in client.events[name]] == client.ids(name)


def check_guilty(client, name):
    """The request has failed for good, and the same request is refused."""
    last, request = client.events[name][-1], client.sequences[name].request
    assert (client.end(name), last.retry) == (FAILED, False)
    with pytest.raises(RequestBanned, match="is refused for 600 seconds"):
        client.ask("again", request.prompt, request.task)


def check_log(caplog):
    """The failed steps with their tracebacks, and a line for each that accuses a request."""
    assert [bool(record.exc_info) for record in caplog.records] == [True] + [True, False] * MAX_ACCUSED
    assert "made a" in caplog.records[-1].getMessage()


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_failed_decode_step_fails_only_the_request_that_fails_alone_too(caplog):
    fakes = make_engine({"t": ECHO}, num_decode=2, rows=1, pages=64, decode_pages=16)
    client = Client(fakes)
    gate = fakes.hold(3)
    requests = {
        "fails": (FAIL, 0),
        "waits for a row": (2, 0),
        "is on its way there": (3, 0),
        "queued": (4, 0),
        "elsewhere": (5, 1),
    }
    for name, (token, decode) in requests.items():
        client.ask(name, [token] * (30 if name == "queued" else 10), max_tokens=8, route=Route(0, decode))
    fakes.step(4)
    assert [client.state(name) for name in requests] == [
        State.DECODING,
        State.TRANSFERRING,
        State.TRANSFERRING,
        State.WAITING,
        State.DECODING,
    ]
    old = fakes.engine.decode_workers[0].pool.manager
    made = fakes.prefill[0].num_tokens
    fakes.decode["t"].fail_on = FAIL
    gate.open = True
    fakes.run()
    check_guilty(client, "fails")
    for name in requests.keys() - {"fails"}:
        check_answer(client, name, 8)
    pool = fakes.engine.decode_workers[0].pool
    # Once among others' pages, and once more alone.
    assert pool.generation == 1 + MAX_ACCUSED
    assert pool.manager is not old
    assert (fakes.engine.decode_workers[1].pool.generation, fakes.engine.prefill_workers[0].pool.generation) == (0, 0)
    # The prefill pool keeps the full pages: those that had been prefilled cost a tail of one token each time.
    assert fakes.prefill[0].num_tokens <= made + 9 + 29 + 2 * 2
    check_log(caplog)


def test_preempted_requests_survive_a_failed_decode_step(caplog):
    fakes = make_engine({"t": ECHO}, decode_pages=14)
    client = Client(fakes)
    client.ask("old", [2] * 20, max_tokens=28)
    client.ask("young", [1] * 20, max_tokens=10)
    fakes.step_until(lambda: client.state("young") is State.PREEMPTED)
    fakes.decode["t"].fail_on = 2
    fakes.step()
    assert fakes.engine.decode_workers[0].pool.generation == 1
    said = len(client.ids("old"))
    assert (client.ended("old"), client.state("young")) == (False, State.PREEMPTED)
    fakes.step_until(lambda: client.ended("old"))
    check_guilty(client, "old")
    # Its tokens until then are reported, once.
    assert [event.completion_tokens for event in client.events["old"]] == [*range(1, said + 1), said]
    fakes.run()
    check_answer(client, "young", 10)
    # Its generated tokens came back from host memory: only the other's were computed again.
    assert 1 not in fakes.decode["t"].scored
    assert len(fakes.decode["t"].scored) == MAX_ACCUSED * said


def test_a_failed_prefill_step_fails_only_the_request_that_fails_alone_too(caplog):
    fakes = make_engine({"t": ECHO}, num_prefill=2, pages=20, decode_pages=64, chunk=8)
    client = Client(fakes)
    client.ask("decodes", [2] * 10, max_tokens=30, route=Route(0, 0))
    fakes.step_until(lambda: client.state("decodes") is State.DECODING)
    fakes.prefill[0].fail_on = FAIL
    client.ask("fails", [3] * 20 + [FAIL] * 21, route=Route(0, 0))
    client.ask("shares the pool", [4] * 30, max_tokens=8, route=Route(0, 0))
    client.ask("queued", [5] * 30, max_tokens=8, route=Route(0, 0))
    client.ask("elsewhere", [6] * 30, max_tokens=8, route=Route(1, 0))
    fakes.run()
    check_guilty(client, "fails")
    check_answer(client, "decodes", 30)
    for name in ("shares the pool", "queued", "elsewhere"):
        check_answer(client, name, 8)
    pools = [worker.pool.generation for worker in (*fakes.engine.prefill_workers, *fakes.engine.decode_workers)]
    assert pools == [1 + MAX_ACCUSED, 0, 0]
    check_log(caplog)


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
    check_guilty(client, "fails")
    check_answer(client, "beside it", 8)
    for name, prompt in (("alike", [3] * 8 + [FAIL] * (length - 9) + [1]), ("another", [4] * 40)):
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
    client.ask("decodes", [2] * 10, max_tokens=20)
    fakes.step_until(lambda: client.state("decodes") is State.DECODING)
    if side == "prefill":
        fakes.prefill[0].fail_on, fakes.prefill[0].fail_late = FAIL, late
    else:
        fakes.decode["t"].fail_on = FAIL
    client.ask("fails", [3] * 3 + [FAIL] * 5)
    fakes.step_until(lambda: client.ended("fails"))
    fakes.prefill[0].fail_on = fakes.decode["t"].fail_on = None
    check_guilty(client, "fails")
    client.ask("after", [4] * 60, max_tokens=3)
    fakes.run()
    check_answer(client, "decodes", 20)
    check_answer(client, "after", 3)
    assert fakes.engine.prefill_workers[0].pool.generation == 1 + MAX_ACCUSED


def test_nothing_of_a_failed_pool_is_hit_again(caplog):
    fakes = make_engine({"t": ECHO})
    client = Client(fakes)
    client.ask("before", [*range(20), FAIL], max_tokens=2)
    fakes.run()
    fakes.decode["t"].fail_on = FAIL
    client.ask("fails", [*range(20), FAIL])
    fakes.run()
    fakes.decode["t"].fail_on = None
    check_guilty(client, "fails")
    client.ask("after", [*range(20), 5], max_tokens=5)
    fakes.run()
    # The prefill pool is intact: it still has the prompt, which is transferred once more after each failure.
    assert [client.cached(name) for name in ("before", "after")] == [0, 20]
    assert fakes.engine.transfers[0].stats.num_pages == 5 * (2 + MAX_ACCUSED)
    assert fakes.prefill[0].num_tokens == 20
    check_answer(client, "after", 5)


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("response_start", [None, 6])
def test_a_step_that_fails_once_fails_nobody(colocated, late, response_start, caplog):
    """Whichever it is: nothing is shown twice, and tokens that were generated are not prefilled."""
    failed = 0
    for number in range(40):
        fakes = make_engine({"t": ECHO}, chunk=8, rows=2, colocated=colocated)
        calls = []

        def fail(fakes=fakes, calls=calls, number=number):
            calls.append(number)
            if len(calls) == number + 1 and not late:
                raise RuntimeError("made to fail once")
            fakes.prefill[0].fail_late = late
            fakes.prefill[0].fail_on = 3 if late and len(calls) == number + 1 else None

        fakes.prefill[0].before = fakes.decode["t"].before = fail
        client = Client(fakes)
        prompts = {"a": [1, *[3] * 20], "b": [2, *[3] * 9], "c": [3] * 30}
        for name, prompt in prompts.items():
            client.ask(name, prompt, max_tokens=7, response_start=response_start if name == "b" else None)
        fakes.run()
        for name in prompts:
            if name != "b" or response_start is None:
                check_answer(client, name, 7)
            else:
                assert (client.end(name), len(client.ids(name))) == ("length", 7)
                assert [event.token_id for event in client.events[name]] == client.ids(name)
        failed += len(caplog.records)
        caplog.clear()
        generations = {pool.generation for pool in fakes.engine.pools}
        assert max(generations) <= 1
        assert set().union(*fakes.prefill[0].chunks) <= {1, 2, 3}
    assert failed >= (8 if late else 20)


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


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("when", ["gathered", "placed", "arrived"])
def test_a_transfer_that_fails_is_sent_again_once(when, times, caplog):
    fakes = make_engine({"t": ECHO})
    client = Client(fakes)
    left, source, target = [times], fakes.prefill_stores[0], fakes.decode_stores[0]
    gather, device_put = source.gather, target.device_put

    def fails(content):
        left[0] -= FAIL in np.asarray(content)[..., TOKEN] and left[0] > 0
        return left[0] < times and FAIL in np.asarray(content)[..., TOKEN] and not done()

    def done():
        finished, left[1:] = bool(left[1:]), [True] if left[0] == 0 else []
        return finished

    def gathered(ids):
        if when == "gathered" and fails(source.pages[list(ids)]):
            raise RuntimeError("made to fail")
        return gather(ids)

    def placed(content):
        if when == "placed" and fails(content):
            raise RuntimeError("made to fail")
        return device_put(content)

    source.gather, target.device_put = gathered, placed
    if when == "arrived":
        lost = RuntimeError("lost on the way")
        target.gate_of = lambda tokens: Gate(polls=3, error=lost) if fails(np.array([[list(tokens)]]).T) else None
    client.ask("fails", [FAIL] * 15, max_tokens=8)
    for number in range(3):
        client.ask(prompt=[number] * 30, max_tokens=8)
    fakes.run()
    for name in client.events.keys() - {"fails"}:
        check_answer(client, name, 8)
    assert fakes.engine.transfers[0].stats.failures == times
    assert [worker.pool.generation for worker in fakes.engine.decode_workers] == [0]
    assert len(caplog.records) == times
    if times == 1:
        check_answer(client, "fails", 8)
        return
    assert (client.end("fails"), client.events["fails"][-1].retry) == (FAILED, None)
    # The same request may be submitted again.
    client.ask("again", [FAIL] * 15, max_tokens=8)
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
    fakes.decode["t"].fail_at = 1
    client.ask("a")
    client.ask("b", (2, 3))
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
