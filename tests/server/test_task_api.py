"""Tasks loaded, replaced and unloaded over HTTP, with fake weights: errors, live requests, and where changes are visible."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from fake_server import SCRIPTS, error_of, pieces, reason, serving
from prometheus_client.parser import text_string_to_metric_families
from serving_fakes import EOS, FakeDecode, Script

from pshare_jax.errors import PshareError

pytestmark = pytest.mark.host
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def loaded(fakes, folder):
    """A module whose file contains the task's completion."""
    if not (folder / "says").is_file():
        raise PshareError(f"{folder} has no file `says`.")
    return FakeDecode(Script([*(folder / "says").read_bytes(), EOS]), fakes.faults)


def module(root, name, says):
    (root / name).mkdir(parents=True, exist_ok=True)
    (root / name / "says").write_text(says)
    return name


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "modules"
    module(folder, "one", "first")
    module(folder, "deep/two", "second")
    return folder


@pytest.fixture
def server(root):
    with serving(modules_dir=root, load=loaded) as running:
        yield running


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """A server for tests that change nothing."""
    folder = tmp_path_factory.mktemp("modules")
    module(folder, "one", "first")
    with serving(modules_dir=folder, load=loaded) as running:
        yield running


def load(server, name, path, **fields):
    return server.client.post(LOAD, json={"lora_name": name, "lora_path": str(path), **fields})


def unload(server, name):
    return server.client.post(UNLOAD, json={"lora_name": name})


def says(server, task):
    response = server.post(model=task)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def names(server):
    return [card["id"] for card in server.client.get("/v1/models").json()["data"]]


def served_tasks(server):
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    return [
        sample.labels["task"]
        for family in families
        for sample in family.samples
        if sample.name == "pshare_served_tasks"
    ]


# --- loading and unloading -------------------------------------------------------------------------------------------


def test_a_task_is_loaded_replaced_and_unloaded(server, root):
    for name in ("x", "org/my task-v1.5 ü"):
        assert error_of(server.post(model=name), 404)["code"] == "model_not_found"
        answer = load(server, name, "one")
        assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
        assert says(server, name) == "first"
        assert server.client.get(f"/v1/models/{name}").json()["id"] == name
        assert names(server) == served_tasks(server) == [*SCRIPTS, name]
        # Absolute paths below the root are accepted too.
        assert load(server, name, root / "deep" / "two", load_inplace=True).status_code == 200
        assert says(server, name) == "second"
        assert names(server) == served_tasks(server) == [*SCRIPTS, name]
        answer = unload(server, name)
        assert (answer.status_code, answer.text) == (200, f"Success: LoRA adapter '{name}' removed successfully.")
        assert names(server) == served_tasks(server) == list(SCRIPTS)
        assert error_of(server.post(model=name), 404)["message"].count(repr(name)) == 1
        assert error_of(server.client.get(f"/v1/models/{name}"), 404)
        assert error_of(unload(server, name), 404)["code"] == "model_not_found"


def test_tasks_of_the_config_are_replaced_and_unloaded_too(server):
    assert load(server, "abc", "one", load_inplace=True).status_code == 200
    assert says(server, "abc") == "first"
    assert names(server) == list(SCRIPTS)
    for name in SCRIPTS:
        assert unload(server, name).status_code == 200
    assert names(server) == served_tasks(server) == []
    assert error_of(server.post(model="abc"), 404)["code"] == "model_not_found"
    assert server.client.get("/health").status_code == 200
    assert load(server, "abc", "one").status_code == 200
    assert says(server, "abc") == "first"


def test_openapi_lists_the_endpoints_but_no_tasks(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {LOAD, UNLOAD} <= set(paths)
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "enum" not in schema["properties"]["model"]


def test_off_by_default():
    with serving() as server:
        for response in (load(server, "x", "one"), unload(server, "abc")):
            assert response.request.url.path in error_of(response, 404)["message"]
        schema = server.client.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]["requestBody"]
        assert schema["content"]["application/json"]["schema"]["properties"]["model"]["enum"] == list(SCRIPTS)


def test_the_endpoints_need_the_key(root):
    with serving(modules_dir=root, load=loaded, api_key="secret") as server:
        assert error_of(load(server, "x", "one"), 401)
        assert error_of(unload(server, "abc"), 401)
        server.client.headers["authorization"] = "Bearer secret"
        assert load(server, "x", "one").status_code == 200
        assert names(server) == [*SCRIPTS, "x"]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_all_paths_outside_get_the_same_error(server, root, tmp_path):
    module(tmp_path, "outside", "secret")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "file").mkdir()
    (root / "file" / "says").symlink_to(tmp_path / "outside" / "says")
    (root / "circle").symlink_to("circle")
    (root / "back").symlink_to(root / "one")
    outside = [tmp_path / "outside", tmp_path / "nothing", "/", "/etc/passwd", root]
    relative = [
        "..",
        "../outside",
        "../nothing",
        "one/../../outside",
        "link",
        "link/.",
        "file",
        "circle",
        ".",
        "",
        "a\0b",
    ]
    errors = [error_of(load(server, "x", path), 400) for path in [*outside, *relative, "x" * 5000]]
    assert errors == [errors[0]] * len(errors)
    assert errors[0]["param"] == "lora_path"
    for path in ("back", "deep/../one", root / "link" / ".." / "modules" / "one"):
        assert load(server, "x", path, load_inplace=True).status_code == 200, path
    # Errors below the root show the path relative to it.
    error = error_of(load(server, "y", "nothing"), 400)
    assert error["param"] == "lora_path"
    assert error["message"].startswith("nothing ")
    assert names(server) == [*SCRIPTS, "x"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"lora_path": "one"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": 5, "lora_path": "one"}, "lora_name"),
        ({"lora_name": "", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "  ", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "a\0b", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "a\u2028b", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "x" * 129, "lora_path": "one"}, "lora_name"),
        ({"lora_name": "x", "lora_path": 5}, "lora_path"),
        ({"lora_name": "x", "lora_path": "one", "load_inplace": "yes"}, "load_inplace"),
        ({"lora_name": "abc", "lora_path": "one"}, "lora_name"),
        ({"lora_name": "abc", "lora_path": "one", "load_inplace": False}, "lora_name"),
    ],
)
def test_bad_bodies_name_the_field(unchanged, fields, param):
    assert error_of(unchanged.client.post(LOAD, json=fields), 400)["param"] == param
    assert names(unchanged) == list(SCRIPTS)
    assert says(unchanged, "abc") == "ABCDEFGH"


def test_the_longest_name(server):
    assert load(server, "ü" * 128, "one").status_code == 200
    assert says(server, "ü" * 128) == "first"


@pytest.mark.parametrize("name", ["abc", "new"])
@pytest.mark.parametrize(
    ("fault", "status", "fact"),
    [
        (PshareError("It was made for another base."), 400, "It was made for another base."),
        (RuntimeError("a bug"), 500, "log"),
        (MemoryError(), 500, "memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 5 bytes"), 500, "memory"),
    ],
)
def test_a_failed_load_changes_nothing(root, caplog, name, fault, status, fact):
    def failing(fakes, folder):
        raise fault

    with serving(modules_dir=root, load=failing) as server:
        error = error_of(load(server, name, "one", load_inplace=True), status)
        assert fact in error["message"]
        assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")
        assert names(server) == served_tasks(server) == list(SCRIPTS)
        assert says(server, "abc") == "ABCDEFGH"
    assert any(record.exc_info for record in caplog.records) is (status == 500)


def test_a_server_with_fixed_tasks_refuses_with_its_reason(root):
    with serving(modules_dir=root, load=loaded, refusal="It cannot be.") as server:
        for response in (load(server, "x", "one"), unload(server, "abc")):
            assert error_of(response, 400)["message"] == "It cannot be."
        assert says(server, "abc") == "ABCDEFGH"


# --- live requests ---------------------------------------------------------------------------------------------------


@contextmanager
def stream_of(server, task):
    """A slow stream after its first line: that line and an iterator over the rest."""
    body = {"model": task, "prompt": "p", "max_tokens": 60, "stream": True}
    server.fakes.decode[task].before = lambda: time.sleep(0.01)
    with httpx.stream("POST", f"{server.client.base_url}/v1/completions", json=body, timeout=10) as response:
        lines = response.iter_lines()
        yield [next(lines)], lines


def rest_of(first, lines):
    data = [line.removeprefix("data: ") for line in (*first, *lines) if line]
    assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


@pytest.mark.parametrize("change", ["replace", "unload"])
def test_a_running_stream_finishes_on_the_old_weights(server, change):
    with stream_of(server, "endless") as (first, lines):
        if change == "replace":
            assert load(server, "endless", "one", load_inplace=True).status_code == 200
            assert says(server, "endless") == "first"
        else:
            assert unload(server, "endless").status_code == 200
            assert error_of(server.post(model="endless"), 404)
        assert server.engine.num_live == 1
        chunks = rest_of(first, lines)
    assert ("".join(pieces(chunks)), reason(chunks)) == ("x" * 60, "length")


def test_requests_run_while_a_task_is_loading_and_the_next_load_waits(root):
    begun, go, order = threading.Event(), threading.Event(), []

    def slow(fakes, folder):
        order.append(folder.name)
        begun.set()
        assert go.wait(10)
        return loaded(fakes, folder)

    with serving(modules_dir=root, load=slow) as server, ThreadPoolExecutor(3) as pool:
        first = pool.submit(load, server, "x", "one")
        assert begun.wait(5)
        second = pool.submit(load, server, "x", "deep/two", load_inplace=True)
        with stream_of(server, "endless") as (head, lines):
            assert "".join(pieces(rest_of(head, lines))) == "x" * 60
        assert says(server, "abc") == "ABCDEFGH"
        assert error_of(server.post(model="x"), 404)
        assert order == ["one"]
        go.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
        assert order == ["one", "two"]
        assert says(server, "x") == "second"
        assert names(server) == [*SCRIPTS, "x"]


def test_shutdown_ends_a_load_at_its_next_check(root):
    begun = threading.Event()

    def slow(fakes, folder):
        begun.set()
        limit = time.monotonic() + 10
        while fakes.engine.accepting:
            assert time.monotonic() < limit
            time.sleep(0.01)
        return loaded(fakes, folder)

    with ThreadPoolExecutor(1) as pool, serving(modules_dir=root, load=slow, drain_seconds=2.0) as server:
        answer = pool.submit(load, server, "x", "one")
        assert begun.wait(5)
        server.stop()
        assert error_of(answer.result(), 503)["type"] == "server_error"
        assert server.served.tasks == list(SCRIPTS)


def test_a_task_unloaded_between_check_and_submission_is_a_404(server):
    server.engine.put_task("abc", {})
    error = error_of(server.post(model="abc"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_log_lines_have_the_task(server, caplog):
    with caplog.at_level("INFO", "pshare_jax.requests"):
        load(server, "x", "one")
        unload(server, "x")
    lines = [json.loads(record.message) for record in caplog.records if record.name == "pshare_jax.requests"]
    assert [(line["path"], line["status"], line["task"]) for line in lines] == [(LOAD, 200, "x"), (UNLOAD, 200, "x")]


def test_requests_of_a_new_task_are_counted(server, caplog):
    """The end hooks count tasks that were loaded later: two requests at once, a disconnect, then /live."""
    server.client.post(LOAD, json={"lora_name": "x", "lora_path": "one"})
    with httpx.stream("POST", f"{server.client.base_url}/v1/completions", json=endless_body()) as response:
        lines = response.iter_lines()
        next(lines)
        with ThreadPoolExecutor(2) as pool:
            texts = list(pool.map(lambda _: server.post(model="x").json()["choices"][0]["text"], range(2)))
        assert texts == ["first", "first"]
        next(lines)
    server.rest()
    assert server.client.get("/health").status_code == 200
    tasks = {task["name"]: task for task in server.client.get("/live").json()["tasks"]}
    assert (tasks["x"]["served"], tasks["x"]["ended"]["finished"]) == (True, 2)
    server.client.post(UNLOAD, json={"lora_name": "x"})
    tasks = {task["name"]: task for task in server.client.get("/live").json()["tasks"]}
    assert (tasks["x"]["served"], tasks["abc"]["served"]) == (False, True)
    assert "failed" not in caplog.text
    assert "a callback failed" not in caplog.text


def endless_body():
    return {"model": "endless", "prompt": "q", "stream": True, "max_tokens": 50_000}
