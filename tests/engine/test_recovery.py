"""No fault reaches further than it must: poisoned requests, shapes, host errors, threads, deadlines and reservations."""

import logging
import threading
import time

import pytest
from fake_engine import PAGE, Client, make_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_fakes import Echo

from pshare_jax.engine import failures, worker_thread
from pshare_jax.engine.failures import RequestBanned, RowFailed
from pshare_jax.engine.request import FAILED, TIMED_OUT
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

POISON = 250
"""No answer has this token."""
TASKS = {"t": Echo("t"), "u": Echo("u")}
BOTH = pytest.mark.parametrize("colocated", [False, True], ids=["split", "colocated"])


def check_answer(client, name):
    """The whole answer was reported, each token once."""
    request, events = client.sequences[name].request, client.events[name]
    assert client.end(name) == "length", name
    assert client.ids(name) == TASKS[request.task].answer(request.prompt, request.max_tokens)
    assert [event.token_id for event in events] == client.ids(name)
    assert [event.completion_tokens for event in events] == list(range(1, request.max_tokens + 1))


def wait_for(reached, seconds=10.0):
    limit = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < limit, "that does not happen"
        time.sleep(0.001)


# --- a poisoned request ------------------------------------------------------------------------------------------------


def in_decode(fakes):
    fakes.decode["u"].fail_on = POISON
    return {"prompt": [1, 2, POISON]}


def at_its_fourth_token(fakes):
    fakes.decode["u"].fail_at = 3
    return {"prompt": [1, 2, 3]}


def in_scoring(fakes):
    fakes.decode["u"].paged.score = _raise
    return {"prompt": [1, 2, 3, 4, 5, 6], "response_start": 3}


def in_prefill(fakes):
    fakes.prefill[0].fail_on = POISON
    return {"prompt": [1, POISON, 3]}


def in_prefill_late(fakes):
    fakes.prefill[0].fail_late = True
    return in_prefill(fakes)


def _raise(*args):
    raise RuntimeError("made to fail")


@BOTH
@pytest.mark.parametrize("poison", [in_decode, at_its_fourth_token, in_scoring, in_prefill, in_prefill_late])
def test_a_poisoned_request_fails_alone(poison, colocated, caplog):
    """Before: six streams of another task and the prefix cache went with it, again at each of the client's two retries."""
    fakes = make_engine(TASKS, pages=256, rows=8, colocated=colocated)
    client = Client(fakes)
    client.ask("first turn", [7] * 30, max_tokens=4)
    fakes.run()
    streams = [client.ask(prompt=[number] * 9, max_tokens=40) for number in range(6)]
    fakes.step_until(lambda: all(len(client.ids(name)) > 5 for name in streams))
    made = len(client.events[streams[0]])
    fields = poison(fakes)
    client.ask("poisoned", task="u", max_tokens=9, **fields)
    fakes.step_until(lambda: client.ended("poisoned"))
    last = client.events["poisoned"][-1]
    assert (last.error, last.retry) == (FAILED, False)
    assert len(client.ids("poisoned")) == (3 if poison is at_its_fourth_token else 0)
    for _ in range(2):
        with pytest.raises(RequestBanned, match="change the prompt"):
            client.ask("retry", task="u", max_tokens=9, **fields)
    # The same prompt for another task is answered.
    if poison not in (in_prefill, in_prefill_late, in_scoring):
        client.ask("other task", max_tokens=9, **fields)
    generations = {pool.name: pool.generation for pool in fakes.engine.pools}
    failed = "prefill pool 0" if colocated or poison in (in_prefill, in_prefill_late) else "decode pool 0"
    assert generations.pop(failed) == 1 + failures.MAX_ACCUSED
    assert set(generations.values()) <= {0}
    client.ask("second turn", [7] * 30, max_tokens=4)
    fakes.run()
    assert made < 40
    for name in client.events.keys() - {"poisoned", "retry"}:
        check_answer(client, name)
    if not colocated and poison not in (in_prefill, in_prefill_late):
        # The prefill pool's cache is whole: nothing of it was computed again.
        assert client.cached("second turn") == 28
        assert [7] * 16 not in [list(chunk) for chunk in fakes.prefill[0].chunks[3:]]


def test_a_ban_ends_and_is_for_one_prompt(monkeypatch, caplog):
    fakes = make_engine(TASKS, stall_seconds=2 * failures.BAN_SECONDS)
    client = Client(fakes)
    fakes.decode["t"].fail_on = POISON
    client.ask("poisoned", [1, POISON])
    fakes.run()
    assert client.events["poisoned"][-1].retry is False
    with pytest.raises(RequestBanned):
        client.ask("again", [1, POISON])
    fakes.decode["t"].fail_on = None
    client.ask("longer", [1, POISON, 1], max_tokens=3)
    fakes.run()
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + failures.BAN_SECONDS)
    client.ask("later", [1, POISON], max_tokens=3)
    fakes.run()
    for name in ("longer", "later"):
        check_answer(client, name)


def test_any_number_of_poisoned_requests_do_not_break_their_worker(caplog):
    """One after another, and nothing else runs: a step on padding clears the worker each time."""
    fakes = make_engine(TASKS)
    client = Client(fakes)
    fakes.decode["t"].fail_on = fakes.prefill[0].fail_on = POISON
    names = [client.ask(prompt=[number, *[POISON] * (1 + number % 2)]) for number in range(3 * failures.MAX_FAILURES)]
    fakes.run()
    assert {client.events[name][-1].retry for name in names} == {False}
    client.ask("healthy", [1, 2], max_tokens=3)
    fakes.run()
    check_answer(client, "healthy")


@pytest.mark.parametrize("num_failures", range(5, 13))
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_broken_device_makes_nobody_guilty(side, num_failures, monkeypatch, caplog):
    """Every step fails for a while, also on padding: the worker is restarted until its device works again, whenever it is."""
    monkeypatch.setattr(worker_thread, "RESTART_SECONDS", (0.0, *[0.01] * 8))
    fakes = make_engine(TASKS, pages=256)
    client, left = Client(fakes), [num_failures]
    names = [client.ask(prompt=[number] * 9, max_tokens=9) for number in range(6)]

    def before():
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("the device is lost")

    weights = fakes.prefill[0] if side == "prefill" else fakes.decode["t"]
    if side == "decode":
        fakes.decode["u"].before = before
    weights.before = before
    fakes.engine.start()
    wait_for(lambda: all(client.ended(name) for name in names))
    assert fakes.engine.healthy
    fakes.engine.stop()
    for name in names:
        check_answer(client, name)
    # How many steps fail before the one on padding depends on how many requests a step has, and so on when they arrive.
    assert num_failures < 10 or "a worker thread failed" in caplog.text


# --- shapes ------------------------------------------------------------------------------------------------------------


def failing_rows(fakes, num_rows, error):
    """Decode steps of so many rows always fail; returns a list that grows with each."""
    step, calls = fakes.decode["t"].paged.decode, []

    def decode(params, rows, tables, pages):
        if len(rows.slots) == num_rows and (rows.slots < len(tables) - 1).any():
            calls.append(num_rows)
            raise error
        return step(params, rows, tables, pages)

    fakes.decode["t"].paged.decode = decode
    return calls


@BOTH
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: 2 GiB"), RuntimeError("bad program")]
)
def test_a_shape_that_fails_is_not_used_again(error, colocated, caplog):
    """Out of memory, or the second time with no guilty request: smaller steps go on, and nobody fails."""
    fakes = make_engine(TASKS, pages=256, rows=4, colocated=colocated)
    calls = failing_rows(fakes, 4, error)
    client = Client(fakes)
    names = [client.ask(prompt=[number] * 9, max_tokens=20) for number in range(4)]
    fakes.run()
    for name in names:
        check_answer(client, name)
    assert calls == ([4, 4] if str(error) == "bad program" else [4])
    (worker,) = fakes.engine.decode_workers
    assert [(rows,) in worker.compiled for rows in (1, 2, 4)] == [True, True, False]


def test_a_prefill_shape_that_runs_out_of_memory_is_not_used_again(caplog):
    fakes = make_engine(TASKS, pages=256, chunk=64)
    step, calls = fakes.prefill[0].paged.prefill, []

    def prefill(params, tokens, rows, pages):
        if tokens.size >= 64:
            calls.append(tokens.shape)
            raise MemoryError
        return step(params, tokens, rows, pages)

    fakes.prefill[0].paged.prefill = prefill
    client = Client(fakes)
    names = [
        client.ask(prompt=[number] * length, max_tokens=9) for number, length in enumerate([15, 15, 15, 15, 200, 90])
    ]
    fakes.run()
    for name in names:
        check_answer(client, name)
    assert len(calls) == len(set(calls)) >= 2


def test_the_last_shape_of_its_kind_stays(caplog):
    fakes = make_engine(TASKS, rows=1)
    failing_rows(fakes, 1, MemoryError())
    client = Client(fakes)
    client.ask("fails", [1] * 9)
    fakes.run()
    assert client.events["fails"][-1].retry is False
    assert (1,) in fakes.engine.decode_workers[0].compiled


# --- the host ----------------------------------------------------------------------------------------------------------


def raising_event(fakes, client):
    def on_event(event):
        raise ConnectionError("gone")

    client.sequences["fails"].on_event = on_event


def raising_text(fakes, client):
    client.sequences["fails"].output.push = lambda token: _raise()


def raising_sampling(fakes, client):
    sampler = fakes.engine.decode_specs[0].sampler
    new_rows = sampler.new_rows

    def rows_that_fail(num_slots):
        rows = new_rows(num_slots)
        join = rows.join

        def joined(slot, sequence):
            if sequence.request.id == "fails":
                raise RowFailed(sequence) from KeyError("bias")
            join(slot, sequence)

        rows.join = joined
        return rows

    sampler.new_rows = rows_that_fail


@BOTH
@pytest.mark.parametrize("fault", [raising_event, raising_text, raising_sampling])
def test_a_host_error_ends_its_row_only(fault, colocated, caplog):
    fakes = make_engine(TASKS, pages=256, colocated=colocated)
    client = Client(fakes)
    names = [client.ask(prompt=[number] * 9, max_tokens=20) for number in range(3)]
    client.ask("fails", [9] * 9, max_tokens=20)
    if fault is not raising_sampling:
        fakes.step_until(lambda: client.state(names[0]) is State.DECODING)
    fault(fakes, client)
    fakes.run()
    for name in names:
        check_answer(client, name)
    assert client.state("fails") is State.FAILED
    assert [pool.generation for pool in fakes.engine.pools] == [0] * len(fakes.engine.pools)


# --- threads -----------------------------------------------------------------------------------------------------------


def test_a_watch_that_fails_goes_on(monkeypatch, caplog):
    """Before: the thread died unnoticed, and no deadline was watched any more."""
    fakes = make_engine(TASKS, stall_seconds=0.2)
    expire, left = fakes.engine.expire, [1]

    def failing():
        left[0] -= 1
        if left[0] >= 0:
            raise RuntimeError("made to fail")
        expire()

    monkeypatch.setattr(fakes.engine, "expire", failing)
    fakes.hold(1)
    client = Client(fakes)
    fakes.engine.start()
    client.ask("stuck", [1] * 9)
    wait_for(lambda: client.ended("stuck"))
    assert client.end("stuck") == TIMED_OUT
    assert fakes.engine.healthy
    fakes.engine.stop()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_the_engine_stops_although_a_step_hangs(monkeypatch, caplog):
    monkeypatch.setattr(worker_thread, "STOP_SECONDS", 0.2)
    fakes = make_engine(TASKS)
    hangs, go = threading.Event(), threading.Event()

    def hang():
        hangs.set()
        go.wait(20)

    fakes.decode["t"].before = hang
    client = Client(fakes)
    fakes.engine.start()
    client.ask("a", [1] * 9)
    assert hangs.wait(10)
    stopper = threading.Thread(target=fakes.engine.stop)
    stopper.start()
    stopper.join(5)
    stopped = not stopper.is_alive()
    go.set()
    stopper.join()
    assert stopped
    assert client.end("a") == "abort"
    assert "is left behind" in caplog.text


# --- deadlines and reservations ------------------------------------------------------------------------------------------


@BOTH
def test_nobody_is_given_up_in_a_full_but_moving_engine(colocated, clock):
    """Before: of 40 healthy requests many ended without progress, while younger requests held the pages."""
    stall = 5.0
    fakes = make_engine(TASKS, pages=40, decode_pages=40, rows=4, chunk=8, colocated=colocated, stall_seconds=stall)
    client = Client(fakes)
    for number in range(40):
        client.ask(prompt=[number] * (10 + 7 * number % 60), task="tu"[number % 2], max_tokens=20 + number % 30)
    for _ in range(20_000):
        if fakes.engine.idle:
            break
        fakes.step()
        clock(stall / 60)
    for name in client.events:
        check_answer(client, name)
    fakes.check()


def test_a_prompt_that_does_not_fit_the_prefill_pool_evicts_no_decode_pages():
    fakes = make_engine(TASKS, pages=24, decode_pages=24, max_len=92, num_decode=2)
    client = Client(fakes)
    client.ask("cached", [1] * 61, max_tokens=2, route=Route(0, 0))
    fakes.run()
    manager = fakes.engine.decode_workers[0].pool.manager
    cached = manager.num_cached
    assert cached == 15
    fakes.hold(2)
    client.ask("holds the prefill pool", [2] * 60, max_tokens=2, route=Route(0, 1))
    fakes.step(8)
    client.ask("waits", [3] * 50, max_tokens=2, route=Route(0, 0))
    fakes.step(8)
    assert client.state("waits") is State.WAITING
    assert (manager.num_cached, manager.num_evicted) == (cached, 0)
    for store in fakes.decode_stores:
        store.gates[2].open = True
    fakes.run()
    for name in client.events:
        check_answer(client, name)


def test_the_oldest_answer_does_not_wait_for_a_younger_prompt_that_it_does_not_need():
    """It waits for pages of a younger prompt, which therefore goes before the prompts between the two."""
    fakes = make_engine(TASKS, pages=128, decode_pages=20, num_decode=2, chunk=64)
    client = Client(fakes)
    client.ask("holds the pages", [8] * 50, max_tokens=12, route=Route(0, 0))
    fakes.step_until(lambda: client.state("holds the pages") is State.DECODING)
    client.ask("oldest", [1] * 41, max_tokens=3, route=Route(0, 0))
    fakes.step(2)
    assert client.state("oldest") is State.WAITING
    fakes.engine.abort("holds the pages")
    for name, prompt in (("first", [2] * 20), ("between", [3] * 10), ("needed", [1] * 41)):
        client.ask(name, prompt, max_tokens=3, route=Route(0, 1))
    fakes.run()
    assert [chunk[0] for chunk in fakes.prefill[0].chunks[:4]] == [8, 2, 1, 3]
    for name in client.events.keys() - {"holds the pages"}:
        check_answer(client, name)


# --- random failures -----------------------------------------------------------------------------------------------------


def step_supervised(fakes):
    """A step, and what a worker's thread does when its worker breaks: also steps on padding may have failed."""
    try:
        fakes.engine.step()
    except failures.WorkerBroken:
        for group in fakes.engine._groups:
            fakes.engine._recovery.group_died(group, False)
            fakes.engine._recovery.group_restarted(group)


@settings(deadline=None, max_examples=60)
@given(
    calls=st.lists(st.integers(0, 80), max_size=6, unique=True),
    late=st.booleans(),
    colocated=st.booleans(),
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=6),
    rows=st.sampled_from([1, 2, 4]),
)
def test_whichever_steps_fail_only_who_failed_twice_alone_may_fail(calls, late, colocated, lengths, rows):
    logging.getLogger("pshare_jax").setLevel(logging.CRITICAL)
    fakes = make_engine(TASKS, pages=30, decode_pages=24, rows=rows, chunk=8, colocated=colocated)
    (prefiller,), (decoder,) = fakes.engine.prefill_workers, fakes.engine.decode_workers
    failed, number = [], [0]
    for watch in (prefiller.watch, decoder.watch):

        def note(failure, kept=watch.failed):
            failed.append((failure.kind, [sequence.request.id for sequence in failure.sequences]))
            return kept(failure)

        watch.failed = note

    def before(weights):
        number[0] += 1
        bad = number[0] in calls
        if bad and not (late and weights is fakes.prefill[0]):
            raise RuntimeError("made to fail")

    for weights in (*fakes.prefill, *fakes.decode.values()):
        weights.before = lambda weights=weights: before(weights)
    client = Client(fakes)
    try:
        for index, (length, count) in enumerate(lengths):
            count = min(count, fakes.engine.facts.max_len - length)
            client.ask(prompt=[index] * length, task="tu"[index % 2], max_tokens=count)
        for _ in range(5000):
            if fakes.engine.idle:
                break
            step_supervised(fakes)
        fakes.check()
    finally:
        logging.getLogger("pshare_jax").setLevel(logging.NOTSET)
    for name in client.events:
        if client.end(name) == FAILED:
            kinds = [kind for kind, names in failed if names == [name]]
            assert any(kinds.count(kind) >= 1 for kind in kinds), failed
            assert sum(name in names for _, names in failed) >= 2
        else:
            check_answer(client, name)
    assert PAGE * fakes.engine.pools[0].manager.num_used == 0


def test_weights_that_always_fail_do_not_break_the_worker(caplog):
    """The steps of one task fail whatever the request is: other tasks go on, over new arrays each time."""
    fakes = make_engine(TASKS, pages=256)
    client = Client(fakes)

    def fail():
        raise RuntimeError("bad weights")

    fakes.decode["u"].before = fail
    client.ask("t", [5] * 9, max_tokens=40)
    client.ask("u", [6] * 9, task="u", max_tokens=3)
    fakes.run()
    check_answer(client, "t")
    assert client.end("u") == FAILED


def test_a_sequence_that_moves_leaves_no_transfer_behind(caplog):
    fakes = make_engine(TASKS, num_prefill=2, num_decode=2, policy="least_loaded")
    engine, client = fakes.engine, Client(fakes)
    fakes.hold(9)
    for number in (5, 6):
        client.ask(f"busy {number}", [number] * 9, max_tokens=40, route=Route(1, 0))
    client.ask("moves", [9] * 9, max_tokens=3, route=Route(0, 0))
    fakes.step_until(lambda: client.state("moves") is State.TRANSFERRING)
    (dead,) = (group for group in engine._groups if engine.prefill_workers[0] in group.prefill)
    engine._recovery.group_died(dead, True)
    engine._groups.remove(dead)
    assert client.sequences["moves"].decode_worker == 1
    for store in fakes.decode_stores:
        store.gates.clear()
    for transfer in engine.admission.in_flight[0]:
        transfer.content.gate = None
    fakes.run()
    for name in client.events:
        check_answer(client, name)


def test_nothing_is_routed_to_a_worker_that_is_dead_for_good(caplog):
    """Not even while the other is being restarted."""
    fakes = make_engine(TASKS, num_decode=2)
    engine, client = fakes.engine, Client(fakes)
    groups = [next(group for group in engine._groups if worker in group.decode) for worker in engine.decode_workers]
    engine._recovery.group_died(groups[0], True)
    engine._recovery.group_died(groups[1], False)
    client.ask("waits", [5] * 20, max_tokens=3)
    assert client.sequences["waits"].decode_worker == 1
    engine._groups.remove(groups[0])
    engine._recovery.group_restarted(groups[1])
    fakes.run()
    check_answer(client, "waits")


def test_requests_of_a_worker_that_is_restarted_keep_nobody_else_waiting(caplog):
    fakes = make_engine(TASKS, num_prefill=2)
    engine, client = fakes.engine, Client(fakes)
    client.ask("of the dead worker", [9] * 60, max_tokens=3, route=Route(0, 0))
    fakes.step_until(lambda: client.state("of the dead worker") is State.PREFILLING)
    (dead,) = (group for group in engine._groups if engine.prefill_workers[0] in group.prefill)
    engine._recovery.group_died(dead, False)
    engine._groups.remove(dead)
    client.ask("other", [5] * 9, max_tokens=3)
    fakes.step_until(lambda: client.ended("other"))
    engine._groups.append(dead)
    engine._recovery.group_restarted(dead)
    fakes.run()
    for name in client.events:
        check_answer(client, name)


def test_one_poisoned_prompt_with_many_choices_costs_as_much_as_one(caplog):
    fakes = make_engine(TASKS, pages=256)
    client = Client(fakes)
    fakes.decode["t"].fail_on = POISON
    names = [client.ask(prompt=[1, 2, POISON]) for _ in range(16)]
    client.ask("bystander", [5] * 9, task="u", max_tokens=40)
    fakes.run()
    assert {client.end(name) for name in names} == {FAILED}
    check_answer(client, "bystander")
    # A pool is lost for each suspect that fails before the first is convicted, not for each choice.
    assert fakes.engine.decode_workers[0].pool.generation < 8


def test_a_shape_comes_back_after_one_failure_that_is_nobodys(caplog):
    fakes = make_engine(TASKS, pages=256, rows=4)
    client, weights = Client(fakes), fakes.decode["t"]
    names = [client.ask(prompt=[number] * 9, max_tokens=20) for number in range(4)]
    fakes.step_until(lambda: 4 in weights.rows)

    def once():
        weights.before = lambda: None
        raise RuntimeError("a glitch")

    weights.before = once
    fakes.run()
    for name in names:
        check_answer(client, name)
    assert (4,) in fakes.engine.decode_workers[0].compiled


def test_an_abort_in_the_middle_of_a_preemption_ends_nothing_else(caplog):
    fakes = make_engine(TASKS, pages=400, decode_pages=126, chunk=512)
    client, store = Client(fakes), fakes.decode_stores[0]
    client.ask("aborted", [5] * 5, max_tokens=80)
    fakes.step_until(lambda: len(client.ids("aborted")) > 3)
    client.ask("scores", [6] * 480, task="u", max_tokens=2, scores_prompt=True, logprobs=0)
    gather = store.gather

    def aborting(ids):
        if client.state("scores") is State.DECODING:
            fakes.engine.abort("aborted")
        return gather(ids)

    store.gather = aborting
    fakes.run()
    assert client.end("aborted") == "abort"
    assert client.ids("scores") == TASKS["u"].answer([6] * 480, 2)
    assert not caplog.records
