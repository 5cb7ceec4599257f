"""Operation over real sockets: metrics, the API key, the request log, shutdown with draining."""

import json
import logging
import re
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from fake_server import PATHS, error_of, pieces, serving
from prometheus_client.parser import text_string_to_metric_families

from pshare_jax.engine.request import ABORTED

pytestmark = pytest.mark.host
DOCS = Path(__file__).parents[2] / "docs"


# --- metrics ---------------------------------------------------------------------------------------------------------


def scrape(server):
    """Samples by (name, labels)."""
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def of_task(samples, name, task="abc", **labels):
    return samples.get((name, tuple(sorted({"task": task, **labels}.items()))), 0.0)


def test_tokens_and_times_by_task():
    with serving() as server:
        server.post(prompt="p" * 40)
        server.post(prompt="p" * 40, n=2)
        server.post(model="org/math-v1.5", prompt="q")
        server.rest()
        samples = scrape(server)
        assert of_task(samples, "pshare_requests_total", outcome="finished") == 3
        assert of_task(samples, "pshare_prompt_tokens_total") == 120
        assert of_task(samples, "pshare_cached_prompt_tokens_total") == 2 * 32
        assert of_task(samples, "pshare_generated_tokens_total") == 9 + 9 + 2
        assert of_task(samples, "pshare_generated_tokens_total", "org/math-v1.5") == 5
        for name in ("queue", "time_to_first_token", "request", "time_per_output_token"):
            assert of_task(samples, f"pshare_{name}_seconds_count") == 3
            assert of_task(samples, f"pshare_{name}_seconds_sum") > 0
        # The pages of both pools add up, and none is in use.
        for pool in server.engine.pools:
            pages = {
                state: samples["pshare_pages", (("pool", pool.name), ("state", state))]
                for state in ("used", "cached", "free")
            }
            assert sum(pages.values()) == pool.num_usable
            assert (pages["used"], pages["cached"] > 0) == (0, True)
        assert samples["pshare_transferred_pages_total", (("decode_worker", "0"),)] > 0
        assert samples["pshare_prefilled_tokens_total", (("worker", "0"),)] == 39 + 2 * 7


def test_live_and_aborted_requests_are_counted():
    with serving() as server:
        url = f"{server.client.base_url}{PATHS[0]}"
        body = {"model": "endless", "prompt": "p", "stream": True}
        with httpx.stream("POST", url, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert scrape(server)["pshare_live_requests", (("state", "decoding"),)] == 1
        server.rest()
        samples = scrape(server)
        assert of_task(samples, "pshare_requests_total", "endless", outcome="aborted") == 1
        assert samples["pshare_live_requests", (("state", "decoding"),)] == 0


def test_the_grafana_dashboard_uses_existing_metrics():
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"pshare_[a-z_]+", target["expr"])
    }
    with serving() as server:
        server.post()
        server.rest()
        existing = {name for name, _ in scrape(server)}
    assert asked
    assert asked <= existing


# --- the key ---------------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_the_key():
    with serving(api_key="sécret") as server:
        right = {b"authorization": "Bearer sécret".encode()}
        assert server.client.get("/health").status_code == 200
        wrong = [b"", b"Bearer wrong", b"Bearer", "Basic sécret".encode(), "sécret".encode()]
        for headers in [{b"authorization": value} for value in wrong]:
            for path in ("/v1/models", "/metrics", "/tokenizer_info", "/nothing"):
                refusal = server.client.get(path, headers=headers)
                assert error_of(refusal, 401)["code"] == "invalid_api_key"
                assert refusal.headers["www-authenticate"] == "Bearer"
                assert "x-request-id" in refusal.headers
            assert error_of(server.post(headers=headers), 401)
        assert server.client.get("/v1/models", headers=right).status_code == 200
        assert server.post(headers=right).json()["choices"][0]["text"] == "ABCDEFGH"


def test_cross_origin_requests_are_refused():
    with serving() as server:
        host = f"{server.client.base_url.host}:{server.client.base_url.port}"
        for origin, status in (("http://evil.example", 403), ("null", 403), (f"http://{host}", 200)):
            for path in ("/flush_cache", PATHS[0]):
                body = {"model": "abc", "prompt": "p"}
                assert server.client.post(path, json=body, headers={"origin": origin}).status_code == status
        assert error_of(server.client.post(PATHS[0], content=b"{}"), 415)


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_each_call_is_one_log_line(caplog, stream):
    with caplog.at_level(logging.INFO, "pshare_jax.requests"), serving() as server:
        server.post(headers={"x-request-id": "mine"}, stream=stream, n=2)
        server.client.get("/v1/models")
        server.post(model="unknown")
        server.rest()
    first, second = (json.loads(record.message) for record in caplog.records if "requests" in record.name)
    assert {**first, "time": 0, "seconds": 0} == {
        "time": 0,
        "request_id": "mine",
        "method": "POST",
        "path": PATHS[0],
        "status": 200,
        "seconds": 0,
        "task": "abc",
        "stream": stream,
        "prompt_tokens": 1,
        "cached_tokens": 0,
        "completion_tokens": 9 + 2,
        "finish_reasons": ["stop", "stop"],
    }
    assert (second["status"], "task" in second) == (404, False)


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_is_logged_as_499(caplog, stream):
    with caplog.at_level(logging.INFO, "pshare_jax.requests"), serving() as server:
        body = {"model": "endless", "prompt": "p", "stream": stream}
        if stream:
            with httpx.stream("POST", f"{server.client.base_url}{PATHS[0]}", json=body) as response:
                lines = response.iter_lines()
                next(lines)
        else:
            with pytest.raises(httpx.TimeoutException):
                server.client.post(PATHS[0], json=body, timeout=0.3)
        server.rest()
        limit = time.monotonic() + 5
        while not (found := [one for one in caplog.records if "requests" in one.name]):
            assert time.monotonic() < limit
            time.sleep(0.01)
    line = json.loads(found[0].message)
    assert (line["status"], line["task"]) == (499, "endless")
    assert line["completion_tokens"] >= 1
    assert "Traceback" not in caplog.text


def test_a_disconnect_within_the_body_leaves_no_traceback(caplog):
    with caplog.at_level(logging.INFO), serving() as server:
        url = server.client.base_url
        with socket.create_connection((url.host, url.port)) as end:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            end.sendall(head + b"Content-Length: 100\r\n\r\n{")
            time.sleep(0.1)
        limit = time.monotonic() + 5
        while not (found := [one for one in caplog.records if one.name == "pshare_jax.requests"]):
            assert time.monotonic() < limit
            time.sleep(0.01)
        assert server.post().status_code == 200
    assert json.loads(found[0].message)["status"] == 499
    assert "Traceback" not in caplog.text


def test_an_unexpected_exception_is_an_error_object_with_its_request_id(monkeypatch, caplog):
    with serving() as server:
        monkeypatch.setattr(server.engine, "submit_all", lambda *_: 1 / 0)
        refusal = server.post(headers={"x-request-id": "mine"})
        assert error_of(refusal, 500)["type"] == "server_error"
        assert refusal.headers["x-request-id"] == "mine"
        monkeypatch.undo()
        assert server.post().status_code == 200
    assert "ZeroDivisionError" in caplog.text


# --- shutdown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "drain", "ends"), [("abc", 5.0, "stop"), ("endless", 0.3, None)])
def test_shutdown_drains_running_requests(model, drain, ends):
    with serving(drain_seconds=drain) as server:
        gate = threading.Event()
        server.fakes.decode[model].before = lambda: gate.wait(0.02)
        url = f"{server.client.base_url}{PATHS[0]}"
        with httpx.stream("POST", url, json={"model": model, "prompt": "p", "stream": True}, timeout=10) as response:
            lines = response.iter_lines()
            first = next(lines)
            server.stop()
            rest = [line.removeprefix("data: ") for line in (first, *lines) if line]
        assert rest.pop() == "[DONE]"
        chunks = [json.loads(line) for line in rest]
        if ends:
            assert "".join(pieces(chunks)) == "ABCDEFGH"
            assert chunks[-1]["choices"][0]["finish_reason"] == ends
        else:
            assert chunks[-1]["error"]["message"] == ABORTED
