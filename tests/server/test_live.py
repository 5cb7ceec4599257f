"""The live page and its data over real sockets: counts equal the usage, secrets stay secret, the key, bounds."""

import base64
import hashlib
import json
import re
import threading
import time

import pytest
from fake_engine import Client, make_engine
from fake_server import PATHS, SCRIPTS, error_of, serving
from serving_fakes import EOS

from pshare_jax.engine.prefill_worker import PrefillSpeed
from pshare_jax.server.dashboard import stats as stats_module
from pshare_jax.server.dashboard.stats import DashboardStats

pytestmark = pytest.mark.host
TASK, OTHER = "abc", "org/math-v1.5"
SESSION_FIELDS = {"label", "live", "calls", "prompt_tokens", "cached_tokens", "last_task", "seconds_ago"}


def look(server, **options):
    response = server.client.get("/live", **options)
    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")
    return response.json()


def of(snapshot, task):
    (found,) = [entry for entry in snapshot["tasks"] if entry["name"] == task]
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_before_any_request():
    with serving() as server:
        stats = look(server)
        assert [task["name"] for task in stats["tasks"]] == list(SCRIPTS)
        zero = {"running": 0, "waiting": 0, "prompt_tokens": 0, "cached_tokens": 0, "generated_tokens": 0}
        nothing = {"ended": {"finished": 0, "aborted": 0, "failed": 0}, "ttft_seconds": None, "request_seconds": None}
        assert all({**task, "name": 0} == {"name": 0, "served": True, **zero, **nothing} for task in stats["tasks"])
        assert (stats["sessions"], stats["ended_without_session"], stats["healthy"]) == ([], 0, True)
        assert stats["window"] == {"seconds": 600, "requests": 0, "full": False}
        assert stats["latency"]["buckets"] == []
        nothing = {"tokens_per_second": None, "seconds_saved_estimate": None}
        assert stats["prefill"] == {"prefilled_tokens": 0, "reused_tokens": 0, **nothing}
        assert stats["pools"] == [
            {"name": pool.name, "used": 0, "cached": 0, "free": pool.num_usable} for pool in server.engine.pools
        ]


def test_counts_equal_the_usage_of_the_requests():
    with serving() as server:
        asked = [
            (TASK, "p" * 40, "one"),
            (OTHER, "p" * 40 + "q" * 30, "one"),
            (TASK, "p" * 40 + "q" * 60, "two"),
            (OTHER, "r" * 17, None),
            (TASK, "s", None),
        ]
        usages = []
        for task, prompt, session in asked:
            answer = server.post(model=task, prompt=prompt, prompt_cache_key=session)
            usages.append((task, session, answer.json()["usage"]))
        server.rest()
        stats = look(server)

    def total(name, wanted=None):
        """The sum over all requests, or over those of a task or session."""
        chosen = [usage for task, session, usage in usages if wanted in (None, task, session)]
        return sum({**usage, **usage["prompt_tokens_details"]}[name] for usage in chosen)

    for task in (TASK, OTHER):
        totals = of(stats, task)
        assert totals["ended"] == {"finished": sum(t == task for t, *_ in asked), "aborted": 0, "failed": 0}
        assert totals["prompt_tokens"] == total("prompt_tokens", task)
        assert totals["cached_tokens"] == total("cached_tokens", task)
        assert totals["generated_tokens"] == total("completion_tokens", task)
        assert 0 < totals["ttft_seconds"]["p50"] <= totals["ttft_seconds"]["p95"]
        assert totals["ttft_seconds"]["p50"] <= totals["request_seconds"]["p50"] <= totals["request_seconds"]["p95"]
    # The last token of a prompt is processed by the decode module: neither prefilled nor reused.
    prefill = stats["prefill"]
    assert prefill["reused_tokens"] == total("cached_tokens") == 32 + 64
    assert prefill["prefilled_tokens"] == total("prompt_tokens") - len(asked) - total("cached_tokens")
    assert prefill["prefilled_tokens"] == server.fakes.prefill[0].num_tokens
    assert prefill["tokens_per_second"] > 0
    estimate = prefill["reused_tokens"] / prefill["tokens_per_second"]
    assert prefill["seconds_saved_estimate"] == pytest.approx(estimate, abs=1e-3)
    # Sessions by last use; requests without a session are only counted.
    second, first = stats["sessions"]
    for row, session, calls, last in ((first, "one", 2, OTHER), (second, "two", 1, TASK)):
        assert set(row) == SESSION_FIELDS
        assert (row["calls"], row["live"], row["last_task"]) == (calls, 0, last)
        assert row["prompt_tokens"] == total("prompt_tokens", session)
        assert row["cached_tokens"] == total("cached_tokens", session)
        assert 0 <= row["seconds_ago"] < 20
    assert stats["ended_without_session"] == 2
    assert stats["window"]["requests"] == sum(bucket["ended"] for bucket in stats["latency"]["buckets"]) == len(asked)
    assert all(0 <= bucket["seconds_ago"] <= 30 for bucket in stats["latency"]["buckets"])
    assert [sum(pool[state] for state in ("used", "cached", "free")) for pool in stats["pools"]] == [
        pool.num_usable for pool in server.engine.pools
    ]
    assert all(pool["used"] == 0 < pool["cached"] for pool in stats["pools"])


def test_live_and_aborted_requests_are_counted():
    with serving() as server:
        body = {"model": "endless", "prompt": "p" * 20, "stream": True, "max_tokens": 90_000}
        with server.client.stream("POST", PATHS[0], json=body, headers={"x-session-id": "mine"}) as response:
            lines = response.iter_lines()
            next(lines)
            stats = look(server)
            assert (of(stats, "endless")["running"], of(stats, "endless")["waiting"]) == (1, 0)
            (session,) = stats["sessions"]
            assert (session["live"], session["calls"], session["last_task"]) == (1, 0, "endless")
            assert all(pool["used"] > 0 for pool in stats["pools"][1:])
        server.rest()
        stats = look(server)
        assert of(stats, "endless")["ended"] == {"finished": 0, "aborted": 1, "failed": 0}
        # An aborted request has a time to first token, but no request time.
        assert of(stats, "endless")["ttft_seconds"] is not None
        assert of(stats, "endless")["request_seconds"] is None
        assert (stats["sessions"][0]["live"], stats["sessions"][0]["calls"]) == (0, 1)


def test_queued_requests_are_waiting():
    with serving(max_len=1600) as server:
        gate = threading.Event()
        server.fakes.prefill[0].before = lambda: gate.wait(10)
        bodies = [{"model": "abc", "prompt": [65 + i] * 1500} for i in range(2)]
        threads = [threading.Thread(target=server.client.post, args=(PATHS[0],), kwargs={"json": b}) for b in bodies]
        for thread in threads:
            thread.start()
        limit = time.monotonic() + 10
        while (of(look(server), TASK)["running"], of(look(server), TASK)["waiting"]) != (1, 1):
            assert time.monotonic() < limit
            time.sleep(0.01)
        gate.set()
        for thread in threads:
            thread.join()


def test_percentiles_are_nearest_rank():
    assert stats_module._percentiles([]) is None
    assert stats_module._percentiles([None]) is None
    assert stats_module._percentiles([3.0]) == {"p50": 3.0, "p95": 3.0}
    assert stats_module._percentiles([float(n) for n in range(20, 0, -1)]) == {"p50": 10.0, "p95": 19.0}
    assert stats_module._percentiles([1.0, None, 2.0, 100.0]) == {"p50": 2.0, "p95": 100.0}


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_no_prompt_completion_or_session_key_is_shown():
    secrets = ["user-4711@example.org", "a chat about my illness", "Größe-é", "prompt-cache-secret"]
    with serving() as server:
        prompt = "my secret prompt " * 5
        server.post(prompt=prompt, headers={"x-session-id": secrets[0]})
        server.post(prompt=prompt, user=secrets[1])
        server.post(prompt=prompt, user=secrets[2])
        server.post(PATHS[1], messages=[{"role": "user", "content": prompt}], prompt_cache_key=secrets[3])
        server.post(prompt=prompt, cache_salt="a-tenant", user=secrets[0])
        server.rest()
        text = server.client.get("/live").text
        labels = [session["label"] for session in json.loads(text)["sessions"]]
    assert len(set(labels)) == len(labels) == 4
    for secret in [*secrets, "secret prompt", "a-tenant", "ABCDEFGH"]:
        assert secret not in text
        assert json.dumps(secret)[1:-1] not in text
        for name in ("md5", "sha1", "sha256", "blake2b"):
            assert hashlib.new(name, secret.encode()).hexdigest()[:8] not in text


def test_labels_differ_between_processes():
    first, second = (DashboardStats(make_engine({"t": [EOS]}).engine, "") for _ in range(2))
    assert first.label("one") == first.label("one") != first.label("two")
    assert first.label("one") != second.label("one")


# --- bounds ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """An engine's client and its statistics, with small bounds."""
    monkeypatch.setattr(stats_module, "MAX_RECORDS", 10)
    monkeypatch.setattr(stats_module, "MAX_SESSIONS", 3)
    fakes = make_engine({"t": [7, EOS]})
    return Client(fakes), DashboardStats(fakes.engine, "base")


def test_records_and_sessions_are_bounded(small):
    client, live = small
    for number in range(25):
        client.ask(session=f"session {number}")
        client.fakes.run()
    stats = live.snapshot()
    assert stats["window"] == {"seconds": 600, "requests": 10, "full": True}
    assert stats["tasks"][0]["ended"]["finished"] == 25
    assert [session["label"] for session in stats["sessions"]] == [live.label(f"session {n}") for n in (24, 23, 22)]
    # Sessions with live requests come first, new or not, and the bound holds.
    client.ask(session="session 22")
    client.ask(session="new")
    stats = live.snapshot()
    assert {session["label"] for session in stats["sessions"][:2]} == {live.label("session 22"), live.label("new")}
    assert [session["live"] for session in stats["sessions"]] == [1, 1, 0]
    client.fakes.run()


def test_records_older_than_the_window_are_not_shown(small, monkeypatch):
    client, live = small
    client.ask()
    client.fakes.run()
    assert live.snapshot()["window"]["requests"] == 1
    monkeypatch.setattr(stats_module, "WINDOW_SECONDS", 0)
    stats = live.snapshot()
    assert (stats["window"]["requests"], stats["latency"]["buckets"]) == (0, [])
    assert stats["tasks"][0]["ttft_seconds"] is None
    assert stats["tasks"][0]["ended"]["finished"] == 1


def test_other_hooks_see_an_end_too(small):
    client, live = small
    ended = []
    client.engine.on_end.append(ended.append)
    client.ask("one")
    client.fakes.run()
    assert ended == [client.sequences["one"]]
    assert live.snapshot()["tasks"][0]["ended"]["finished"] == 1


def test_failed_requests_are_counted(small):
    client, live = small
    client.fakes.prefill[0].fail_on = 66
    client.ask(prompt=[66] * 9, session="s")
    client.fakes.step_until(lambda: client.engine.idle)
    stats = live.snapshot()
    assert stats["tasks"][0]["ended"] == {"finished": 0, "aborted": 0, "failed": 1}
    assert stats["latency"]["ttft_seconds"] is None
    assert stats["latency"]["buckets"][0]["ended"] == 1


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_complete_and_loads_nothing():
    with serving() as server:
        response = server.client.get("/")
        paths = server.client.get("/openapi.json").json()["paths"]
        message = error_of(server.client.get("/nothing"), 404)["message"]
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = response.text
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|srcset|<link[^>]+href=\"(?!data:)|\bsrc=", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son[a-z]+=|style=", page)
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(script) > 1000 < len(style)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)]
    assert policy == {
        "default-src": "'none'",
        "script-src": f"'sha256-{digests[0]}'",
        "style-src": f"'sha256-{digests[1]}'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert ("/" in paths, "/live" in paths) == (False, True)
    assert "GET /live" in message


def test_the_page_needs_no_key_and_its_data_does():
    with serving(api_key="sécret") as server:
        page = server.client.get("/")
        assert page.status_code == 200
        assert not any(task in page.text for task in SCRIPTS)
        for headers in ({}, {b"authorization": b"Bearer wrong"}):
            assert error_of(server.client.get("/live", headers=headers), 401)["code"] == "invalid_api_key"
        assert look(server, headers={b"authorization": "Bearer sécret".encode()})["tasks"]


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_prefill_speed_is_that_of_the_fastest_step_size():
    speed = PrefillSpeed()
    assert (speed.best, speed.seconds) == (None, 0)
    speed.add([7], 0.7)
    assert speed.best == pytest.approx(10)
    speed.add([512], 1.0)
    speed.add([400, 100], 2.0)  # 400 tokens took 1.6 s of these, 100 tokens 0.4 s
    assert speed.best == pytest.approx(512.0)
    speed.add([512], 3.0)
    assert speed.best == pytest.approx(max(1024 / 4, 400 / 1.6, 100 / 0.4))
    assert speed.seconds == pytest.approx(6.7)
