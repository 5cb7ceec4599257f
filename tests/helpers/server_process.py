"""The real server (serve/main.py, default CPU placement) in a process of its own, beside the same model in this one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

import pshare_jax as ps

ROOT = Path(__file__).parents[2]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Served:
    """The server's process and client, and the same model and tasks in this process."""

    def __init__(self, base, modules, config, cache):
        environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
        self.output = cache / "output.txt"
        command = [sys.executable, str(ROOT / "serve" / "main.py"), "--config", str(config), f"base={base}"]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "server.port=0"], stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cache
            )
        self.shared = ps.factorize(ps.load(base))
        for name, source in modules.items():
            self.shared.add_task(name, source["module"] if isinstance(source, dict) else source)
        self.url = self._wait()
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def _wait(self):
        limit = time.monotonic() + 240
        while not (found := re.search(r"^ready in [\d.]+ s: (http://\S+)$", self.output.read_text(), re.MULTILINE)):
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < limit, self.output.read_text()
            time.sleep(0.05)
        return found[1]

    def expected(self, task, ids, count, sampling=None):
        """The oracle's (text, finish reason, number of tokens); fails the test's premise on a near-tie."""
        rolled = ps.rollout(self.shared, task, ids, max_new_tokens=count, sampling=sampling or ps.SamplingParams())
        assert rolled.smallest_gap > 1e-4, "draw another prompt"
        ended = rolled.ids[-1] in self.shared.model.stop_ids
        text = self.shared.model.tokenizer.decode(rolled.ids[: len(rolled.ids) - ended])
        return text, "stop" if ended else "length", len(rolled.ids)

    def generate(self, task, ids, count):
        """The oracle's new ids."""
        return ps.generate(self.shared, task, ids, max_new_tokens=count)

    def ask(self, path, **body):
        """(text, finish reason, completion tokens), streamed or not as `body` says."""
        return self.answer(path, **body)[0]

    def answer(self, path, **body):
        """The same, and the usage object."""
        body = {"model": "chat", "temperature": 0, **body}
        if not body.get("stream"):
            answer = self.client.post(path, json=body).json()
            choice = answer["choices"][0]
            text = choice["message"]["content"] if path == CHAT else choice["text"]
            return (text, choice["finish_reason"], answer["usage"]["completion_tokens"]), answer["usage"]
        lines = self.client.post(path, json={**body, "stream_options": {"include_usage": True}}).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
        text = "".join(c["delta"].get("content", "") if path == CHAT else c["text"] for c in choices)
        usage = chunks[-1]["usage"]
        return (text, choices[-1]["finish_reason"], usage["completion_tokens"]), usage


@contextmanager
def serving(base, modules, folder, **config) -> Iterator[Served]:
    """Start the server for `modules` (task name -> source, or the config's entry with a `module`) and stop it.

    Its log must be clean and its end wanted.
    """
    file = folder / "serve.yaml"
    tasks = {name: source if isinstance(source, dict) else str(source) for name, source in modules.items()}
    file.write_text(json.dumps({"base": "overridden", "tasks": tasks, **config}))
    server = Served(base, modules, file, folder)
    try:
        yield server
    finally:
        server.client.close()
        server.process.send_signal(signal.SIGTERM)
        try:
            status = server.process.wait(timeout=60)
        finally:
            server.process.kill()
    output = server.output.read_text()
    assert status == 0, output
    assert output.endswith("stopped\n")
    assert "Traceback" not in output
    assert "Warning" not in output
