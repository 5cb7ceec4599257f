"""The HTTP face over real sockets with fake workers behind it: any output can be forced, any disconnect be seen."""

import json
import threading
import time
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from fake_engine import make_engine
from serving_fakes import EOS, EOT, VOCAB, ByteTokenizer

from pshare_jax.engine.config import resolved
from pshare_jax.server.app import AppContext, make_app
from pshare_jax.server.draining import DrainingServer
from pshare_jax.server.openai.to_requests import Limits
from pshare_jax.server.tasks.table import TaskTable
from pshare_jax.text.chat_style import ChatStyle, plain_style

FAMILY = "👨‍👩‍👧 한국어 नमस्ते é"
SCRIPTS = {
    "abc": [*b"ABCDEFGH", EOS],
    "org/math-v1.5": [*b"math", EOT],
    "qwen3:mit Leer ü": [*FAMILY.encode(), EOS],
    "broken": [0xF0, 0x9F, 0x41, 0xFF, 0xE2, 0x82],
    "endless": [120],
}
PATHS = ["/v1/completions", "/v1/chat/completions"]
PAGE = 16
MAX_LEN = 100_000


class Running:
    """A server in a thread, the fakes behind it, and an HTTP client."""

    def __init__(self, fakes, served, client, server):
        self.fakes, self.engine, self.served, self.client, self._server = fakes, fakes.engine, served, client, server

    def stop(self):
        """What SIGTERM does."""
        self._server.should_exit = True

    def post(self, path="/v1/completions", headers=None, **body):
        return self.client.post(path, json={"model": "abc", "prompt": "p", **body}, headers=headers)

    def ask(self, path, **body):
        """The answer's text, finish reason and completion tokens, as a stream and whole: both must agree."""
        prompt = {"messages": [{"role": "user", "content": "p"}]} if "chat" in path else {"prompt": "p"}
        body = {"model": "abc", **prompt, **body}
        whole = self.client.post(path, json=body).json()
        streamed = self.stream(path, **body, stream_options={"include_usage": True})
        choice = whole["choices"][0]
        text = choice["message"]["content"] if "chat" in path else choice["text"]
        result = (text, choice["finish_reason"], whole["usage"]["completion_tokens"])
        assert ("".join(pieces(streamed)), reason(streamed), streamed[-1]["usage"]["completion_tokens"]) == result
        return result

    def stream(self, path, **body):
        """The chunks of a stream that must end with [DONE]."""
        response = self.client.post(path, json={**body, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def rest(self, live=0, seconds=2.0):
        """Waits until `live` requests are left, and if none is, until all their pages are back."""
        limit = time.monotonic() + seconds
        while self.engine.num_live != live or (live == 0 and not self.engine.idle):
            assert time.monotonic() < limit, "requests still live"
            time.sleep(0.01)
        if live == 0:
            with self.engine.lock:
                self.engine.admission.check()


def pieces(chunks):
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    return [choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices]


def reason(chunks):
    (only,) = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"] and c["choices"][0]["finish_reason"]]
    return only


@contextmanager
def serving(
    max_len=MAX_LEN,
    chunk=512,
    max_body_bytes=100_000,
    api_key=None,
    drain_seconds=0.0,
    modules_dir=None,
    load=None,
    refusal=None,
    allowed_origins=(),
    tokenizer=None,
    style_of=plain_style,
    scripts=SCRIPTS,
    **settings,
):
    """With `modules_dir`, `load(fakes, folder)` gives the weights of a task that is added."""
    fakes = make_engine(
        scripts, page_size=PAGE, pages=max_len // PAGE + 1, chunk=chunk, moves=(32,), debug=False, **settings
    )
    engine = fakes.engine
    limits = Limits(max_len, VOCAB, frozenset({EOS, EOT}), resolved(engine.config.limits.max_requests))
    table = None
    if modules_dir is not None and load is not None:

        def loaded(folder, workers, check) -> Any:
            weights = load(fakes, folder)
            check()
            return dict.fromkeys(workers, weights), ChatStyle()

        table = TaskTable(engine, modules_dir, range(len(engine.decode_workers)), loaded, refusal)
    served = AppContext(
        engine,
        tokenizer or ByteTokenizer(),
        limits,
        max_body_bytes,
        api_key,
        base="tiny",
        task_table=table,
        allowed_origins=allowed_origins,
        style_of=style_of,
    )
    engine.start()
    try:
        with answering(served, drain_seconds) as (client, server):
            running = Running(fakes, served, client, server)
            yield running
            # A stop, if the test asked for one, ends the threads itself.
            stopped = server.should_exit or not engine.accepting or engine.broken
            assert stopped or all(thread.alive for thread in engine._threads)
    finally:
        engine.stop()
        if table is not None:
            table.stop()
    assert fakes.faults == []


@contextmanager
def answering(served, drain_seconds=0.0):
    """An HTTP client of an engine that runs, and the server between."""
    config = uvicorn.Config(
        make_app(served), port=0, log_level="error", ws="none", timeout_graceful_shutdown=int(drain_seconds) + 1
    )
    server = DrainingServer(config, served.engine, lambda: None, drain_seconds)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            yield client, server
    finally:
        server.should_exit = True
        served.engine.stop()
        thread.join()


def error_of(response, status):
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error
