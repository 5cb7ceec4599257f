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

from pshare_jax.engine.request import ABORTED, Request
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host
DOCS = Path(__file__).parents[2] / "docs"


# --- metrics ---------------------------------------------------------------------------------------------------------


def scrape(server):
    """Samples by (name, labels)."""
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


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
        body = {"model": "endless", "prompt": "p", "stream": True, "max_tokens": 50_000}
        with httpx.stream("POST", url, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert scrape(server)["pshare_live_requests", (("state", "decoding"),)] == 1
        server.rest()
        samples = scrape(server)
        assert of_task(samples, "pshare_requests_total", "endless", outcome="aborted") == 1
        assert samples["pshare_live_requests", (("state", "decoding"),)] == 0


def test_times_are_recorded_when_they_are_known():
    """A stream without end: its time in the queue and to its first token, before it ends."""
    with serving() as server:
        body = {"model": "endless", "prompt": "p", "stream": True, "max_tokens": 50_000}
        with server.client.stream("POST", PATHS[0], json=body) as response:
            lines = response.iter_lines()
            next(lines)
            samples = scrape(server)
            assert of_task(samples, "pshare_queue_seconds_count", "endless") == 1
            assert of_task(samples, "pshare_time_to_first_token_seconds_count", "endless") == 1
            assert of_task(samples, "pshare_request_seconds_count", "endless") == 0
        server.rest()
        samples = scrape(server)
        assert of_task(samples, "pshare_queue_seconds_count", "endless") == 1
        assert of_task(samples, "pshare_time_to_first_token_seconds_count", "endless") == 1


def test_the_queue_time_of_requests_that_are_never_admitted_is_recorded():
    with serving(max_len=1024) as server:
        server.fakes.hold(130)
        server.engine.submit(Request("hog", "endless", (130,) * 700, 5), lambda event: None)
        with pytest.raises(httpx.TimeoutException):
            server.client.post(PATHS[0], json={"model": "abc", "prompt": [100] * 700}, timeout=0.2)
        server.rest(1)
        samples = scrape(server)
        assert of_task(samples, "pshare_queue_seconds_count") == 1
        assert 0.1 < of_task(samples, "pshare_queue_seconds_sum") < 2
        assert of_task(samples, "pshare_prompt_tokens_total") == 0
        server.engine.abort_all()


def test_refusals_are_counted_by_status_and_reason():
    with serving(max_requests=1, max_len=400, api_key="key") as server:
        server.client.headers["authorization"] = "Bearer key"
        server.post(prompt="p" * 500)
        server.post(n=0)
        server.post(temperature=[])
        server.post(user=5)
        server.post(model="never " * 9)
        server.client.post(PATHS[0], content=b"[", headers={"content-type": "application/json"})
        server.client.post(PATHS[0], content=b"{}")
        server.client.post(PATHS[0], json={}, headers={"origin": "http://evil.example"})
        server.client.post(PATHS[0], json={}, headers={"authorization": "Bearer wrong"})
        server.client.post("/detokenize", json={"tokens": [9999]})
        server.fakes.hold(130)
        server.engine.submit(Request("hog", "endless", (130,) * 40, 5), lambda event: None)
        server.post()
        server.engine.abort_all()
        server.post()
        samples = scrape(server)
    found = {
        (dict(labels)["status"], dict(labels)["reason"]): value
        for (name, labels), value in samples.items()
        if name == "pshare_refusals_total"
    }
    assert found == {
        ("400", "context_length_exceeded"): 1,
        ("400", "n"): 1,
        ("400", "temperature"): 1,
        ("400", "user"): 1,
        ("404", "model_not_found"): 1,
        ("400", "invalid_request_error"): 2,
        ("415", "invalid_request_error"): 1,
        ("403", "permission_error"): 1,
        ("401", "invalid_api_key"): 1,
        ("429", "rate_limit_exceeded"): 1,
        ("503", "unavailable"): 1,
    }


def test_gateways_find_the_load_under_their_names():
    with serving(max_len=1024) as server:
        model = (("model_name", "tiny"),)
        names = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "gpu_cache_usage_perc")
        samples = scrape(server)
        assert [samples[f"vllm:{name}", model] for name in names] == [0, 0, 0, 0]
        tasks = ",".join(server.engine.tasks)
        lora = (("max_lora", str(len(server.engine.tasks))), ("running_lora_adapters", tasks))
        assert samples["vllm:lora_requests_info", (*lora, ("waiting_lora_adapters", ""))] > 0
        pages = str(sum(pool.num_usable for pool in server.engine.pools))
        assert samples["vllm:cache_config_info", (("block_size", "16"), ("num_gpu_blocks", pages))] == 1
        server.fakes.hold(130)
        for token in (130, 131):
            server.engine.submit(Request(str(token), "abc", (token,) * 700, 5), lambda event: None)
        limit = time.monotonic() + 5
        while server.engine.num_in_state[State.TRANSFERRING] != 1:
            assert time.monotonic() < limit
            time.sleep(0.01)
        samples = scrape(server)
        waiting, running, usage, older = (samples[f"vllm:{name}", model] for name in names)
        assert (waiting, running, usage) == (1, 1, older)
        assert 0.6 < usage < 0.8
        server.engine.abort_all()


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
        server.post(n=0)
        server.rest()
        existing = {name for name, _ in scrape(server)}
    assert asked
    assert asked <= existing


# --- the key ---------------------------------------------------------------------------------------------------------


def test_every_route_but_probes_needs_the_key():
    with serving(api_key="sécret") as server:
        right = {b"authorization": "Bearer sécret".encode()}
        for path in ("/health", "/ready", "/version"):
            assert server.client.get(path).status_code == 200
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


def test_bodies_must_be_json():
    with serving() as server:
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
        body = {"model": "endless", "prompt": "p", "stream": stream, "max_tokens": 50_000}
        if stream:
            with httpx.stream("POST", f"{server.client.base_url}{PATHS[0]}", json=body) as response:
                lines = response.iter_lines()
                next(lines)
        else:
            with pytest.raises(httpx.TimeoutException):
                server.client.post(PATHS[0], json=body, timeout=0.3)
        server.rest()
        limit = time.monotonic() + 5
        while not (found := [record for record in caplog.records if "requests" in record.name]):
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
        while not (found := [record for record in caplog.records if record.name == "pshare_jax.requests"]):
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
        body = {"model": model, "prompt": "p", "stream": True, "max_tokens": 50_000}
        with httpx.stream("POST", url, json=body, timeout=10) as response:
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
