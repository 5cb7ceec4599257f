"""app.py over real sockets: clients that disconnect in every state, failed steps, full, failed and stopping servers."""

import json
import socket
import time
from contextlib import contextmanager

import httpx
import pytest
from fake_server import PATHS, error_of, pieces, serving

from pshare_jax.engine import worker_thread
from pshare_jax.engine.request import ABORTED, FAILED, Request
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host
ENDLESS = {"model": "endless", "prompt": "p", "max_tokens": 90_000}
SMALL_LEN = 1024
LONG = [100] * 700


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def wait_for(reached, seconds=5.0):
    limit = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < limit, "timed out"
        time.sleep(0.002)


@contextmanager
def endless_stream(server):
    """A stream that runs until the block ends; yields its lines after the first."""
    with httpx.stream("POST", f"{server.client.base_url}/v1/completions", json={**ENDLESS, "stream": True}) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield lines


# --- disconnects -----------------------------------------------------------------------------------------------------


def queued(server):
    """A transfer that never completes holds most of the pool."""
    server.fakes.hold(130)
    server.engine.submit(Request("hog", "abc", (130,) * 700, 5), lambda event: None)
    return State.WAITING


def prefilling(server):
    server.fakes.prefill[0].before = lambda: time.sleep(0.1)
    return State.PREFILLING


def transferring(server):
    server.fakes.hold(100)
    return State.TRANSFERRING


def decoding(server):
    server.fakes.decode["endless"].before = lambda: time.sleep(0.01)
    return State.DECODING


def send(server, body):
    """Sends a request and returns its socket; the response is never read."""
    raw = json.dumps(body).encode()
    client = socket.create_connection((server.client.base_url.host, server.client.base_url.port))
    head = (
        f"POST {PATHS[0]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    client.sendall(head.encode() + raw)
    return client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prepare", [queued, prefilling, transferring, decoding])
def test_disconnecting_in_every_state(prepare, stream):
    """Case A1-26: the request is aborted and its pages are free in less than two seconds."""
    with serving(max_len=SMALL_LEN, chunk=64) as server:
        state = prepare(server)
        others = server.engine.num_live
        for _ in range(2):
            with send(server, {**ENDLESS, "prompt": LONG, "max_tokens": 300, "stream": stream}):
                wait_for(lambda: server.engine.num_live > others)
                *_, sequence = server.engine._live.values()
                wait_for(lambda sequence=sequence: sequence.state is state)
                time.sleep(0.05)
                assert sequence.state is state
            server.rest(others)
            assert sequence.state is State.ABORTED
        server.engine.abort_all()
        server.rest()
        assert len(server.fakes.decode["endless"].inputs) < 300


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_is_an_error_object(server, stream, caplog):
    decode = server.fakes.decode["abc"]
    decode.fail_at = 0
    error = error_of(server.post(stream=stream, prompt=f"first {stream}"), 500)
    assert (error["message"], error["type"]) == (FAILED, "server_error")
    decode.fail_at = 2
    if stream:
        chunks = server.stream("/v1/completions", model="abc", prompt="second, stream")
        assert pieces(chunks[:-1]) == ["A", "B"]
        assert chunks[-1]["error"]["message"] == FAILED
    else:
        error_of(server.post(prompt="second"), 500)
    decode.fail_at = None
    assert server.ask("/v1/completions")[0] == "ABCDEFGH"


def test_a_full_server_reports_its_limit_and_when_to_retry():
    with serving(max_requests=1) as server:
        with endless_stream(server):
            refusal = server.post()
            error = error_of(refusal, 429)
            assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
            assert " 1 " in error["message"]
            assert refusal.headers["retry-after"] == "1"
        server.rest()
        assert server.post().status_code == 200


def test_health_reports_a_failed_worker_while_others_serve(monkeypatch, caplog):
    monkeypatch.setattr(worker_thread, "RESTART_SECONDS", ())
    with serving(num_decode=2) as server:
        assert server.client.get("/health").json() == {"status": "ok"}

        def die():
            raise SystemError("dead")

        monkeypatch.setattr(server.engine.decode_workers[0], "step", die)
        server.engine.wake()
        wait_for(lambda: server.client.get("/health").status_code == 503)
        assert server.ask("/v1/completions")[0] == "ABCDEFGH"
        assert not server.engine.broken
        server.stop()


def test_a_stopping_server_ends_streams_with_an_error():
    with serving() as server:
        with endless_stream(server) as lines:
            server.engine.abort_all()
            rest = list(lines)
        assert json.loads(rest[-4].removeprefix("data: "))["error"]["message"] == ABORTED
        assert rest[-2] == "data: [DONE]"
        error_of(server.post(), 503)
