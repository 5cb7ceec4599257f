"""engine.py and its rooms, stepped in turn over fakes: the walk, routing, aborts and failures at every place."""

import threading
import time

import pytest
from serving_fakes import EOS, Gate, make_engine

from pshare_jax.serving.engine import EngineDown, EngineFull, group_by_devices
from pshare_jax.serving.request import FAILED, Request
from pshare_jax.serving.router import Router

SCRIPT = [*b"xyz", EOS]


class Client:
    """Submits requests and keeps what comes up."""

    def __init__(self, engine):
        self.engine = engine
        self.events = {}

    def ask(self, name, prompt=(1, 2, 3), task="t", **fields):
        events = self.events[name] = []
        fields = {"max_tokens": 50, "stop_ids": frozenset({EOS}), **fields}
        self.engine.submit(Request(name, task, tuple(prompt), **fields), events.append)

    def text(self, name):
        return "".join(event.text for event in self.events[name])

    def end(self, name):
        last = self.events[name][-1]
        assert [event.last for event in self.events[name]].count(True) == 1
        return last.finish_reason or last.error


def run(engine):
    for _ in range(1000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to rest")


def test_a_request_walks_down_once_and_its_tokens_come_up():
    engine, (prefill,), decode = make_engine({"t": SCRIPT})
    client = Client(engine)
    client.ask("a", (5, 6, 7))
    run(engine)
    assert prefill.chunks == [(5, 6)]
    # The last prompt token is the decode module's first input, then its own tokens.
    assert decode.inputs == [("t", 7), ("t", 120), ("t", 121), ("t", 122)]
    assert (client.text("a"), client.end("a")) == ("xyz", "stop")
    assert client.events["a"][-1].completion_tokens == 4
    stats = engine.transfers[0].stats
    assert (stats.count, stats.num_bytes) == (1, 20)
    assert engine.num_live == 0


@pytest.mark.parametrize("count", [1, 2])
def test_exactly_max_tokens(count):
    engine, _, decode = make_engine({"t": SCRIPT})
    client = Client(engine)
    client.ask("a", max_tokens=count)
    run(engine)
    assert (len(decode.inputs), client.end("a")) == (count, "length")


def test_a_prompt_of_one_token_has_an_empty_kv():
    engine, (prefill,), decode = make_engine({"t": SCRIPT})
    client = Client(engine)
    client.ask("a", (9,))
    run(engine)
    assert (prefill.chunks, decode.inputs[0], client.text("a")) == ([()], ("t", 9), "xyz")


def test_long_prompts_go_in_chunks():
    engine, (prefill,), _ = make_engine({"t": SCRIPT})
    Client(engine).ask("a", [1] * 1300)
    run(engine)
    assert [len(chunk) for chunk in prefill.chunks] == [512, 512, 275]


def test_tasks_answer_for_themselves():
    engine, _, _ = make_engine({"t": SCRIPT, "u": [*b"other", EOS]})
    client = Client(engine)
    for name, task in (("a", "t"), ("b", "u"), ("c", "t")):
        client.ask(name, task=task)
    run(engine)
    assert [client.text(name) for name in "abc"] == ["xyz", "other", "xyz"]


def test_decoding_waits_until_the_kv_has_arrived_and_others_go_first():
    engine, _, decode = make_engine({"t": SCRIPT})
    gate = Gate()
    decode.gates[(1, 1)] = (gate,)
    client = Client(engine)
    client.ask("late", (1, 1, 1))
    client.ask("early", (2, 2, 2))
    for _ in range(20):
        engine.step()
    assert client.end("early") == "stop"
    assert client.events["late"] == []
    assert engine.decode_workers[0].must_poll
    gate.ready = True
    run(engine)
    assert client.text("late") == "xyz"


def test_kv_does_not_pile_up_before_a_decode_worker():
    engine, (prefill,), decode = make_engine({"t": SCRIPT})
    decode.gates[(1, 1)] = (Gate(),)
    client = Client(engine)
    for name in "abcdef":
        client.ask(name, (1, 1, 1))
    for _ in range(20):
        engine.step()
    assert len(prefill.chunks) == 2


def test_abort_while_waiting_prefilling_transferring_and_decoding():
    for steps in range(8):
        engine, (prefill,), decode = make_engine({"t": [120]})
        decode.gates[(1,) * 1200] = (gate := Gate(steps > 4),)
        client = Client(engine)
        client.ask("a", [1] * 1201)
        for _ in range(steps):
            engine.step()
        engine.abort("a")
        used = len(prefill.chunks) + len(decode.inputs)
        engine.step()
        engine.step()
        assert client.end("a") == "abort", steps
        assert len(prefill.chunks) + len(decode.inputs) == used
        assert engine.num_live == 0
        gate.ready = True
        client.ask("b", max_tokens=1)
        run(engine)
        assert client.end("b") == "length"


def test_abort_behind_a_busy_worker_does_not_wait_for_it():
    engine, (prefill,), _ = make_engine({"t": [120]})
    client = Client(engine)
    client.ask("running", max_tokens=10**6)
    for _ in range(3):
        engine.step()
    client.ask("waiting", (7, 7))
    engine.abort("waiting")
    engine.step()
    assert client.end("waiting") == "abort"
    assert (7,) not in prefill.chunks


def test_a_failed_step_fails_that_request_only(caplog):
    engine, (prefill,), decode = make_engine({"t": SCRIPT})
    client = Client(engine)
    prefill.fail_on = 66
    client.ask("bad", (66, 1))
    client.ask("good")
    run(engine)
    assert (client.end("bad"), client.end("good")) == (FAILED, "stop")
    decode.fail_at = 1
    client.ask("bad2")
    run(engine)
    assert (client.end("bad2"), client.text("bad2")) == (FAILED, "x")
    decode.fail_at = None
    client.ask("good2")
    run(engine)
    assert client.end("good2") == "stop"
    assert len(caplog.records) == 2


def test_full_and_stopped_engines_refuse():
    engine, _, _ = make_engine({"t": SCRIPT}, max_requests=2)
    client = Client(engine)
    client.ask("a")
    client.ask("b")
    with pytest.raises(EngineFull):
        client.ask("c")
    run(engine)
    client.ask("d")
    engine.stop()
    assert client.end("d") == "abort"
    assert not engine.healthy
    with pytest.raises(EngineDown):
        client.ask("e")


def test_prefill_goes_to_the_least_loaded_worker():
    engine, prefills, _ = make_engine({"t": SCRIPT}, num_prefill=2)
    client = Client(engine)
    for name in "abcd":
        client.ask(name)
    run(engine)
    assert [len(prefill.chunks) for prefill in prefills] == [2, 2]


def test_all_routes_reach_every_task_of_every_worker_and_every_prefill_worker():
    engine, _, _ = make_engine({"t": SCRIPT, "u": SCRIPT}, num_prefill=3)
    assert engine.all_routes() == [((0, 0), "t"), ((1, 0), "u"), ((2, 0), "t")]


def test_router_counts_down_again():
    router = Router(2, [["t"], ["t", "u"]])
    assert [router.assign(task) for task in "tttu"] == [(0, 0), (1, 1), (0, 0), (1, 1)]
    router.release(0, 0)
    router.release(0, 0)
    assert router.assign("t") == (0, 0)
    assert (router.prefill_load, router.decode_load) == ([1, 2], [1, 2])


def test_workers_that_share_devices_share_a_thread():
    assert group_by_devices([{0}, {1}, {0}]) == [[1], [0, 2]]
    assert group_by_devices([{0}, {1}, {0, 1}, {2}]) == [[0, 1, 2], [3]]


@pytest.mark.parametrize("devices", [((0,), (1,)), ((0,), (0,))])
def test_threads_serve_and_stop(devices):
    engine, _, _ = make_engine({"t": SCRIPT}, devices=devices)
    engine.start()
    done = threading.Semaphore(0)
    for i in range(20):
        request = Request(str(i), "t", (1, 2), 50, stop_ids=frozenset({EOS}))
        engine.submit(request, lambda event: done.release() if event.last else None)
    for _ in range(20):
        assert done.acquire(timeout=10)
    assert engine.healthy
    engine.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("side", ["prefill_workers", "decode_workers"])
def test_a_dead_thread_fails_its_requests_and_shows_in_health(side, monkeypatch):
    engine, _, _ = make_engine({"t": [120]})
    engine.start()
    events, done = [], threading.Event()
    started = threading.Event()

    def on_event(event):
        events.append(event)
        started.set()
        if event.last:
            done.set()

    def die():
        raise SystemError("dead")

    engine.submit(Request("a", "t", (1, 2), 10**6), on_event)
    assert started.wait(10)
    worker = getattr(engine, side)[0]
    monkeypatch.setattr(worker, "step", die)
    engine._wake()
    limit = time.monotonic() + 10
    while engine.healthy:
        assert time.monotonic() < limit
    with pytest.raises(EngineDown):
        engine.submit(Request("b", "t", (1, 2), 1), on_event)
    if side == "decode_workers":
        assert done.wait(10)
        assert events[-1].error == FAILED
    engine.stop()
    # A request on a healthy worker lives on until the engine stops.
    assert events[-1].last
