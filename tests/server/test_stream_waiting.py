"""A streamed call that waits: nothing while it is in the queue, its head and comment lines once it is admitted."""

import threading
import time
from contextlib import contextmanager

import pytest
from fake_server import PATHS, error_of, serving

from pshare_jax.engine.request import TIMED_OUT, Event, Request
from pshare_jax.engine.sequence import State
from pshare_jax.server import event_stream

pytestmark = pytest.mark.host
SMALL_LEN = 1024
BEAT = 0.1


@pytest.fixture(autouse=True)
def _short_heartbeat(monkeypatch):
    monkeypatch.setattr(event_stream, "HEARTBEAT_SECONDS", BEAT)


@contextmanager
def held():
    """A server whose prefill steps wait for the event; they do not run the test out of time if it fails."""
    with serving(max_len=SMALL_LEN) as server:
        gate = threading.Event()
        server.fakes.prefill[0].before = lambda: gate.wait(5)
        try:
            yield server, gate
        finally:
            gate.set()


@pytest.mark.parametrize("path", PATHS)
def test_an_admitted_stream_begins_without_a_token(path):
    with held() as (server, gate):
        body = {"model": "abc", "prompt": "pp", "messages": [{"role": "user", "content": "pp"}], "stream": True}
        began = time.monotonic()
        with server.client.stream("POST", path, json=body) as response:
            assert response.status_code == 200
            assert BEAT <= time.monotonic() - began < 2
            lines = response.iter_lines()
            waiting = [next(lines) for _ in range(6)]
            assert waiting == [": waiting", ""] * 3
            gate.set()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert sum(line.startswith("data: {") for line in rest) >= 9


def test_a_late_token_is_bridged_by_comments():
    with serving() as server:
        pauses = iter([0.0, 0.0, 0.5])
        server.fakes.decode["abc"].before = lambda: time.sleep(next(pauses, 0.0))
        chunks = []
        with server.client.stream("POST", PATHS[0], json={"model": "abc", "prompt": "p", "stream": True}) as response:
            for line in response.iter_lines():
                chunks.append(line)
        at = chunks.index(": waiting")
        assert 0 < at < len(chunks) - 2
        assert chunks.count(": waiting") >= 2


def test_tokens_without_a_line_do_not_count():
    """A chat's text that may still become a stop string is held back, token after token."""
    with serving() as server:
        server.fakes.decode["abc"].before = lambda: time.sleep(BEAT / 2)
        body = {"model": "abc", "messages": [{"role": "user", "content": "p"}], "stop": "ABCDEFGX", "stream": True}
        with server.client.stream("POST", PATHS[1], json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines.count(": waiting") >= 2
        assert sum("ABCDEFG" in line for line in lines) == 1


def test_a_queued_stream_may_still_become_an_error():
    """A pool full of another request: nothing is sent, so a time-out in the queue has its own status."""
    with serving(max_len=SMALL_LEN) as server:
        server.fakes.hold(130)
        server.engine.submit(Request("hog", "abc", (130,) * 700, 5), lambda event: None)

        def give_up():
            time.sleep(6 * BEAT)
            for sequence in server.engine.live:
                if sequence.request.id != "hog":
                    assert sequence.admitted is None
                    server.engine.end(sequence, State.FAILED, Event(error=TIMED_OUT, retry=True))

        thread = threading.Thread(target=give_up)
        thread.start()
        response = server.post(prompt=[100] * 700, stream=True)
        thread.join()
        assert error_of(response, 503)["message"] == TIMED_OUT
        server.engine.abort_all()
        server.rest()


def test_a_stream_begins_when_it_is_admitted_late():
    with serving(max_len=SMALL_LEN) as server:
        gate = server.fakes.hold(130)
        server.engine.submit(Request("hog", "abc", (130,) * 700, 5), lambda event: None)
        body = {"model": "abc", "prompt": [100] * 700, "stream": True}
        timer = threading.Timer(5 * BEAT, lambda: setattr(gate, "open", True))
        server.fakes.decode["abc"].before = lambda: time.sleep(0.15)
        timer.start()
        began = time.monotonic()
        with server.client.stream("POST", PATHS[0], json=body) as response:
            assert time.monotonic() - began >= 5 * BEAT
            assert "data: [DONE]" in list(response.iter_lines())
        timer.join()
        server.rest()


def test_openai_ignores_the_comments():
    openai = pytest.importorskip("openai")
    with held() as (server, gate), openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="none") as client:
        messages = [{"role": "user", "content": "pp"}]
        stream = client.chat.completions.create(model="abc", messages=messages, stream=True)
        threading.Timer(4 * BEAT, gate.set).start()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "ABCDEFGH"


@pytest.mark.parametrize("admitted", [False, True])
def test_a_client_that_leaves_while_it_waits(admitted):
    with held() as (server, gate):
        if admitted:
            with server.client.stream(
                "POST", PATHS[0], json={"model": "abc", "prompt": "pp", "stream": True}
            ) as response:
                next(response.iter_lines())
        else:
            server.fakes.hold(130)
            with pytest.raises(Exception, match="timed out"):
                server.client.post(PATHS[0], json={"model": "abc", "prompt": "pp", "stream": True}, timeout=BEAT / 2)
        gate.set()
        server.rest()
