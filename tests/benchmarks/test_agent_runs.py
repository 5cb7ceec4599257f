"""benchmarks/agents.py against servers: failures are named, counts are exact, a run's trace can be replayed, servers end."""

import asyncio
import contextlib
import io
import json
import os
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from fake_server import serving

from benchmarks import agents
from benchmarks.agents_load import servers, targets
from benchmarks.agents_load.client import Client
from benchmarks.agents_load.config import BenchConfig
from benchmarks.agents_load.runner import play
from benchmarks.agents_load.servers import Checkout, Server, started
from benchmarks.agents_load.statistics import summarize
from benchmarks.agents_load.workload import Call, Session
from pshare_jax.errors import PshareError

pytestmark = pytest.mark.host

ROOT = Path(__file__).parents[2]
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
ANSWERS = {
    "good": [{"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, {"choices": [], "usage": USAGE}, "[DONE]"],
    "short": [{"choices": [{"text": "a"}]}, {"choices": [], "usage": {**USAGE, "completion_tokens": 1}}, "[DONE]"],
    "longer prompt": [{"choices": [], "usage": {**USAGE, "prompt_tokens": 4}}, "[DONE]"],
    "cut": [{"choices": [{"text": "a"}]}],
    "error": [{"error": {"message": "no"}}, "[DONE]"],
    "not json": ["{"],
}
FAILURES = {
    "good": None,
    "short": "answer of another length",
    "longer prompt": "prompt of another length",
    "cut": "broken stream",
    "error": "error in the stream",
    "not json": "broken stream",
    "refused": "HTTP 429",
    "silent": "timeout",
}


class Scripted(BaseHTTPRequestHandler):
    """Answers as its model's name says; `silent` sends nothing until the test ends."""

    ended = threading.Event()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] == "silent":
            self.ended.wait(20)
            return
        self.send_response(429 if body["model"] == "refused" else 200)
        self.end_headers()
        for chunk in ANSWERS.get(body["model"], []):
            data = chunk if isinstance(chunk, str) else json.dumps(chunk)
            self.wfile.write(f": comment\n\ndata: {data}\n\n".encode())

    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def scripted():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    Scripted.ended.clear()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        Scripted.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def played(url, sessions, at_once=10, arrivals=False, call_seconds=5.0):
    async def run():
        async with Client(url, chat=False, api_key=None, call_seconds=call_seconds) as client:
            return await play(client, sessions, at_once, arrivals, lambda record: None)

    return asyncio.run(run())


def test_every_failure_is_named_and_ends_its_session():
    calls = {model: Call(model, (1, 2, 3), 2) for model in FAILURES}
    sessions = [Session(model, (call, calls["good"])) for model, call in calls.items()]
    with scripted() as url:
        # `silent` takes all of it, the others milliseconds, also on a busy machine.
        run = played(url, sessions, call_seconds=8.0)
    first = {}
    for record in run.calls:
        first.setdefault(record.session, record)
    assert {name: record.failure for name, record in first.items()} == FAILURES
    assert [record.session for record in run.calls if record.call.model == "good"] == ["good", "good"]
    numbers = summarize(run)
    assert numbers["calls"] == 2
    assert numbers["failures"] == {
        "answer of another length": 1,
        "prompt of another length": 1,
        "broken stream": 2,
        "error in the stream": 1,
        "HTTP 429": 1,
        "timeout": 1,
    }
    assert (numbers["failed_sessions"], numbers["unsent_calls"]) == (7, 7)
    # Only what succeeded counts.
    assert (numbers["prompt_tokens"], numbers["cached_tokens"], numbers["completion_tokens"]) == (6, 2, 4)
    assert (numbers["hit_ratio"], numbers["prefilled_tokens"]) == (1 / 3, 2)
    assert any(detail.startswith("error in the stream:") for detail in numbers["failure_details"])


def test_a_server_that_is_not_there_is_a_failure():
    run = played("http://127.0.0.1:9/v1", [Session("s", (Call("m", (1,), 1),))])
    assert summarize(run)["failures"] == {"ConnectError": 1}
    assert summarize(run)["call_s"] is None


class Recorder:
    """In the place of a client: how many calls run at once, and when each began, by a clock of its own."""

    def __init__(self):
        self.running = self.most = 0
        self.begun = []

    async def send(self, session, call):
        self.running += 1
        self.most = max(self.most, self.running)
        self.begun.append((session, call.model))
        await asyncio.sleep(0.001)
        self.running -= 1
        return type("Record", (), {"failure": None, "ended": time.perf_counter()})()


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_sessions_run_at_once_each_in_order(at_once):
    sessions = [Session(str(i), tuple(Call(str(j), (), 1) for j in range(3))) for i in range(7)]
    recorder = Recorder()
    run = asyncio.run(play(recorder, sessions, at_once, False, lambda record: None))  # pyright: ignore[reportArgumentType]
    assert recorder.most == at_once
    for session in sessions:
        assert [model for name, model in recorder.begun if name == session.name] == ["0", "1", "2"]
    assert [record.name for record in run.sessions] == [session.name for session in sessions]


def test_arrivals_wait_for_their_time_and_latency_counts_the_queue():
    """The second arrives while the first runs: its latency begins with its arrival."""
    sessions = [Session("late", (Call("m", (), 1),), 0.02), Session("first", (Call("m", (), 1),), 0.0)]
    run = asyncio.run(play(Recorder(), sessions, 1, True, lambda record: None))  # pyright: ignore[reportArgumentType]
    assert [record.name for record in run.sessions] == ["first", "late"]
    assert run.sessions[1].began == pytest.approx(run.began + 0.02, abs=1e-9)


CONFIG = {
    "tasks": {"names": ["one", "two"]},
    "workload": {
        "sessions": 3,
        "turns": 2,
        "context": 64,
        "instruction": 8,
        "output": 4,
        "tool_output": 12,
        "vocab_size": 250,
    },
    "load": {"at_once": [1, 3]},
    "repetitions": 2,
}


def command(*arguments):
    """The exit status of the command, its output and its errors."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = agents.main([str(argument) for argument in arguments])
    return status, out.getvalue(), errors.getvalue()


# The first prompt of 72 tokens; each later prompt has 16 tokens of context, the instruction, and its last token is not
# prefilled.
PREFILLED = 71 + 3 * (16 + 7)


def test_the_command_measures_a_server_and_replays_its_trace(tmp_path):
    trace, out = tmp_path / "trace.jsonl", tmp_path / "out"
    with serving(scripts={"one": [*b"xy"], "two": [*b"z"]}) as server:
        url = f"{str(server.client.base_url).rstrip('/')}/v1"
        run_file = tmp_path / "run.yaml"
        run_file.write_text(json.dumps({**CONFIG, "urls": {"fake": url}}))
        status, text, _ = command("--config", run_file, "--out", out, "--write-trace", trace)
        results = json.loads((out / "results.json").read_text())
        server.rest()
        replay = {
            **CONFIG,
            "repetitions": 1,
            "load": {},
            "urls": {"fake": url},
            "trace": {"file": str(trace), "block_size": 16},
        }
        (tmp_path / "replay.yaml").write_text(json.dumps(replay))
        again = tmp_path / "again"
        assert command("--config", tmp_path / "replay.yaml", "--out", again)[0] == status == 0
        replayed = json.loads((again / "results.json").read_text())
    assert len(results["runs"]) == 4
    for run in (*results["runs"], *replayed["runs"]):
        assert run["began_empty"]
        assert (run["sessions"], run["calls"], run["failures"]) == (3, 12, {})
        assert run["completion_tokens"] == 48
        assert run["prefilled_per_session"] == run["server_prefilled_per_session"] == PREFILLED
    calls = [json.loads(line) for line in (out / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == 48
    assert sum(call["prompt_tokens"] - 1 - call["cached_tokens"] for call in calls) == 12 * PREFILLED
    assert all(0 < call["ttft_s"] <= call["seconds"] for call in calls)
    assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
    assert {"cpu", "cores", "memory_gib", "python", "packages"} <= set(results["machine"])
    assert results["configs"]["run"]["workload"]["context"] == 64
    assert "run: fake; 4 runs, 48 calls\n" in text


def test_failures_are_shown_and_the_status_says_so(tmp_path):
    """The second task is not served; the warm-up calls it too, so nothing is measured. Unknown only later, it is counted."""
    with serving(scripts={"one": [*b"xy"]}) as server:
        url = f"{str(server.client.base_url).rstrip('/')}/v1"
        config = {**CONFIG, "urls": {"fake": url}, "repetitions": 1}
        (tmp_path / "a.yaml").write_text(json.dumps(config))
        status, _, errors = command("--config", tmp_path / "a.yaml", "--out", tmp_path)
        assert (status, "The warm-up of fake failed: HTTP 404" in errors) == (2, True)
        config["load"] = {"at_once": [1], "num_tasks": [1, 2]}
        (tmp_path / "b.yaml").write_text(json.dumps(config))
        status, text, _ = command("--config", tmp_path / "b.yaml", "--out", tmp_path)
    assert [run["failures"] for run in json.loads((tmp_path / "results.json").read_text())["runs"]] == [
        {},
        {"HTTP 404": 3},
    ]
    assert (status, "FAILED: 3 x HTTP 404" in text) == (1, True)


def fake_checkout(folder, code):
    (folder / "serve").mkdir(parents=True)
    (folder / "serve" / "main.py").write_text(code)
    return Checkout("fake", folder)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_that_dies_is_reported_with_its_last_lines(tmp_path):
    checkout = fake_checkout(tmp_path, "print('line one'); raise SystemExit(3)")
    with pytest.raises(PshareError, match=r"ended with status 3; the last lines of .*server.log:\nline one"):
        started(lambda: Server(checkout, {}, [], tmp_path / "out"), 20)


def wait_for_output(log):
    limit = time.monotonic() + 60
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < limit, "the process has not begun"
        time.sleep(0.01)


def test_a_server_that_is_never_ready_is_ended_by_force(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "STOP_SECONDS", 0.1)
    code = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    checkout = fake_checkout(tmp_path, code + "print(os.getpid(), flush=True)\ntime.sleep(200)")

    def begun():
        server = Server(checkout, {}, [], tmp_path / "out")
        wait_for_output(server.log)
        return server

    with pytest.raises(PshareError, match=r"not ready after 0\.1 s"):
        started(begun, 0.1)
    assert not alive(int((tmp_path / "out" / "server.log").read_text()))


def test_a_stop_ends_the_servers(tmp_path, monkeypatch):
    """SIGTERM, which acts like Ctrl-C, while a server starts."""
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(200)"
    checkout = fake_checkout(tmp_path / "fake", code)
    monkeypatch.setattr(agents, "ROOT", checkout.path)
    monkeypatch.setattr(Checkout, "check", lambda self: None)
    config = {"tasks": {"kind": "base"}, "start_seconds": 90}
    (tmp_path / "a.yaml").write_text(json.dumps(config))
    log = tmp_path / "a" / "shared-this" / "server.log"

    def stop():
        wait_for_output(log)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        status, _, errors = command("--config", tmp_path / "a.yaml", "--out", tmp_path)
    finally:
        thread.join()
    assert (status, errors) == (130, "agents: stopped; results.json has the runs that ended\n")
    assert not alive(int(log.read_text()))


def test_a_stop_while_a_process_begins_ends_it_too():
    """The signal arrives when the process runs and nobody knows it yet."""
    ended = []

    class Begun:
        def __init__(self):
            signal.raise_signal(signal.SIGINT)

        def wait(self, seconds):
            raise AssertionError("the stop was lost")

        def stop(self):
            ended.append(self)

    # Tests that run in the background may ignore SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            started(cast(Any, Begun), 1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(ended) == 1


class FakeServer:
    """In the place of a server of `memory` MiB."""

    url = "http://127.0.0.1:9"

    def __init__(self, name, memory, stopped):
        self.name, self._memory, self._stopped = name, memory, stopped

    def memory_mib(self):
        return self._memory

    def stop(self):
        self._stopped.append(self.name)


@pytest.mark.parametrize("free", [None, 1200, 1100])
def test_servers_run_together_where_there_is_memory(tmp_path, monkeypatch, free):
    """One needs 1,000 MiB, so with 1,100 free they take turns: each use is a start and a warm-up."""
    starts, stopped, warmed = [], [], []

    def start(make, seconds):
        starts.append(FakeServer(f"{len(starts)}", 1000, stopped))
        return starts[-1]

    monkeypatch.setattr(targets, "started", start)
    monkeypatch.setattr(targets, "available_mib", lambda: free)
    checkouts = [Checkout("this", tmp_path), Checkout("against", tmp_path)]
    used = ["this", "against", "against", "this"]
    with targets.Targets(BenchConfig(), "shared", checkouts, {}, tmp_path, warmed.append, print) as found:
        assert found.names == ["this", "against"]
        servers_used = [found.get(name).server for name in used]
    assert [starts.index(server) for server in servers_used] == [0, 1, 1, 2 if free == 1100 else 0]
    assert [target.checkout for target in warmed] == ["this", "against", "this"][: len(starts)]
    assert sorted(stopped) == [server.name for server in starts]


def test_an_interrupted_stop_ends_the_other_servers(tmp_path, monkeypatch):
    stopped = []

    class Interrupted(FakeServer):
        def stop(self):
            super().stop()
            raise KeyboardInterrupt

    kinds = [FakeServer, Interrupted, FakeServer]
    monkeypatch.setattr(targets, "started", lambda make, seconds: kinds.pop()(len(kinds), 1, stopped))
    checkouts = [Checkout(name, tmp_path) for name in "abc"]
    found = targets.Targets(BenchConfig(), "shared", checkouts, {}, tmp_path, lambda target: None, print)
    for name in "abc":
        found.get(name)
    with pytest.raises(KeyboardInterrupt):
        found.__exit__(None, None, None)
    assert sorted(stopped) == [0, 1, 2]


def test_another_folder_is_no_checkout(tmp_path):
    with pytest.raises(PshareError, match="no checkout of pshare_jax"):
        Checkout("against", tmp_path).check()
    Checkout("this", ROOT).check()
