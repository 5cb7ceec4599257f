"""What a client learns of a failure: whether the same request may succeed later; and what a failed call leaves behind."""

import asyncio
from types import SimpleNamespace

import pytest
from fake_server import PATHS, error_of, serving

from pshare_jax.engine import engine as engine_module
from pshare_jax.engine.failures import RequestBanned
from pshare_jax.engine.request import FAILED, TIMED_OUT, Event, Request
from pshare_jax.engine.sequence import State
from pshare_jax.server import app, completions
from pshare_jax.server.event_queue import EventQueue, Mailbox
from pshare_jax.server.openai.responses import ResponseBuilder

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def fail_next(server, event):
    """Makes the engine end the next request at its first step."""

    def end():
        server.fakes.prefill[0].before = lambda: None
        for sequence in server.engine.live:
            server.engine.end(sequence, State.FAILED, event)

    server.fakes.prefill[0].before = end


# (what the engine reports, status, header, value)
ENDS = [
    (Event(error=TIMED_OUT, retry=True), 503, "retry-after", "5"),
    (Event(error=FAILED, retry=False), 500, "x-should-retry", "false"),
    (Event(error=FAILED), 500, None, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("event", "status", "header", "value"), ENDS)
def test_an_error_says_whether_to_retry(server, stream, event, status, header, value):
    fail_next(server, event)
    response = server.post(prompt="pp", stream=stream)
    assert error_of(response, status)["message"] == event.error
    sent = {name: response.headers[name] for name in ("retry-after", "x-should-retry") if name in response.headers}
    assert sent == ({header: value} if header else {})
    server.rest()


def test_a_banned_request_is_not_retried(server, monkeypatch):
    def ban(*_):
        raise RequestBanned("This request made a step fail.")

    monkeypatch.setattr(server.engine, "submit_all", ban)
    response = server.post()
    assert error_of(response, 422)["code"] == "request_banned"
    assert response.headers["x-should-retry"] == "false"


def test_a_stopping_server_says_when_to_retry():
    with serving() as server:
        server.engine.stop_accepting()
        response = server.post()
        assert error_of(response, 503)["code"] == "unavailable"
        assert response.headers["retry-after"] == "5"


def test_openai_retries_only_what_may_succeed(server, monkeypatch):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.client.base_url}/v1", api_key="none", max_retries=2)
    monkeypatch.setattr(client, "_sleep_for_retry", lambda **_: None)
    for event, _, _, value in ENDS:
        calls = []

        def end(event=event, calls=calls):
            calls.append(event)
            for sequence in server.engine.live:
                server.engine.end(sequence, State.FAILED, event)

        server.fakes.prefill[0].before = end
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="abc", prompt="pp")
        assert len(calls) == (1 if value == "false" else 3)
        server.rest()
    server.fakes.prefill[0].before = lambda: None
    client.close()


# --- orphans ---------------------------------------------------------------------------------------------------------


def failing(*args, **_kwargs):
    for coroutine in filter(asyncio.iscoroutine, args):
        coroutine.close()
    raise RuntimeError("made to fail")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("part", ["ResponseBuilder", "asyncio"])
def test_a_failure_after_the_submission_leaves_no_request(server, monkeypatch, caplog, part, stream):
    if part == "ResponseBuilder":
        monkeypatch.setattr(app, part, failing)
    else:
        monkeypatch.setattr(completions, part, SimpleNamespace(**{**vars(asyncio), "create_task": failing}))
    error_of(server.post(model="endless", max_tokens=90_000, n=3, stream=stream), 500)
    server.rest()
    assert "made to fail" in caplog.text


def test_a_failure_within_the_submission_leaves_no_request(server, monkeypatch):
    route = engine_module.Engine.route
    routed: list[str] = []

    def second_fails(engine, sequence, given):
        routed.append(sequence.request.id)
        if len(routed) == 2:
            raise RuntimeError("made to fail")
        route(engine, sequence, given)

    monkeypatch.setattr(engine_module.Engine, "route", second_fails)
    error_of(server.post(model="endless", max_tokens=90_000, n=3), 500)
    assert len(routed) == 2
    server.rest()


def test_a_call_that_is_cancelled_while_it_is_submitted_leaves_no_request(server):
    """Long bodies are submitted in a thread, which a cancelled call cannot stop."""
    requests = [Request("late", "endless", (1, 2, 3), 5000)]

    async def call():
        events = EventQueue(server.engine, requests, Mailbox(asyncio.get_running_loop()))
        events.abort()
        events.submit()

    asyncio.run(call())
    server.rest()


@pytest.mark.parametrize("path", PATHS)
def test_a_failure_while_a_stream_is_sent_leaves_no_request(server, monkeypatch, path):
    monkeypatch.setattr(ResponseBuilder, "start", failing)
    body = {"model": "endless", "prompt": "p", "messages": [{"role": "user", "content": "p"}], "max_tokens": 90_000}
    with pytest.raises(Exception, match=r"incomplete|closed|disconnected"):
        server.client.post(path, json={**body, "stream": True})
    server.rest()


def test_requests_of_other_calls_go_on(server, monkeypatch):
    events: list[Event] = []
    server.engine.submit(Request("other", "abc", (1, 2, 3), 5), events.append)
    monkeypatch.setattr(app, "ResponseBuilder", failing)
    error_of(server.post(), 500)
    server.rest()
    assert events[-1].finish_reason == "length"
