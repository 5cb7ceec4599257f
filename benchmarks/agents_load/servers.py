"""Servers that the benchmark starts, and what a server says of itself beside its answers.

A server is a process of its own from a checkout of this project: its own package, all programs compiled before it is
used, its output in a log file. One that dies is reported with the last lines of its log.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pshare_jax.errors import PshareError

READY = re.compile(r"^ready in [\d.]+ s: (http://\S+)$", re.MULTILINE)
STOP_SECONDS = 20
LOG_LINES = 20
COUNTERS = (
    "pshare_prefilled_tokens",
    "pshare_prefill_slots",
    "pshare_decode_steps",
    "pshare_decoded_tokens",
    "pshare_preemptions",
    "pshare_transferred_pages",
    "pshare_compiled_programs",
)
"""Counters whose growth during a run is part of its numbers, summed over workers."""


@dataclass(frozen=True)
class Checkout:
    """A checkout of this project, and how results name it."""

    name: str
    path: Path

    def environment(self) -> dict[str, str]:
        """The environment in which Python imports this checkout's package."""
        return {**os.environ, "PYTHONPATH": str(self.path)}

    def check(self) -> None:
        """Raises PshareError if it is no checkout, or if another package would be imported."""
        if not (self.path / "serve" / "main.py").is_file():
            raise PshareError(f"{self.path} is no checkout of pshare_jax: it has no serve/main.py.")
        command = [sys.executable, "-c", "import pshare_jax; print(pshare_jax.__file__)"]
        found = subprocess.run(
            command, env=self.environment(), cwd=self.path, capture_output=True, text=True, check=True
        )
        if not Path(found.stdout.strip()).is_relative_to(self.path):
            raise PshareError(f"Python imports {found.stdout.strip()}, not the package of {self.path}.")

    def commit(self) -> str:
        """The commit, with + if files have changed."""
        git = ["git", "-C", str(self.path)]
        try:
            commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
            changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return commit.strip() + ("+" if changed else "")


class Server:
    """A running server of a checkout. `folder` gets its config and log."""

    def __init__(self, checkout: Checkout, config: Mapping[str, object], overrides: Sequence[str], folder: Path):
        self.checkout, self.url = checkout, ""
        folder.mkdir(parents=True, exist_ok=True)
        file, self.log = folder / "serve.yaml", folder / "server.log"
        file.write_text(json.dumps(config, indent=2))
        fixed = ["server.port=0", "server.host=127.0.0.1", "server.log_requests=false", "server.drain_seconds=0"]
        command = [sys.executable, str(checkout.path / "serve" / "main.py"), "--config", str(file), "--warmup", "full"]
        with self.log.open("w") as log:
            # A session of its own: Ctrl-C reaches the benchmark alone, which then stops the server.
            self._process = subprocess.Popen(
                [*command, *fixed, *overrides],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=checkout.environment(),
                cwd=checkout.path,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> None:
        """Waits until every program is compiled.

        Raises:
            PshareError: it has died, or is not ready after `seconds`.
        """
        limit = time.monotonic() + seconds
        while not self._ready():
            self.check()
            if time.monotonic() > limit:
                raise PshareError(f"The server is not ready after {seconds:g} s; {self._last_lines()}")
            time.sleep(0.2)

    def _ready(self) -> bool:
        found = READY.search(self.log.read_text(errors="replace"))
        if found is None:
            return False
        self.url = found[1]
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/ready", timeout=10, trust_env=False).status_code == 200
        return False

    def check(self) -> None:
        """Raises PshareError if the process has ended."""
        if (status := self._process.poll()) is not None:
            raise PshareError(f"The server ended with status {status}; {self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return f"the last lines of {self.log}:\n" + "\n".join(lines)

    def memory_mib(self) -> int | None:
        """The most memory that it has held, where the system says so."""
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self._process.pid}/status").read_text()
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                return int(found[1]) // 1024
        return None

    def stop(self) -> None:
        """Ends the process: by force after `STOP_SECONDS`, or at once if the wait is interrupted."""
        try:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


def started(make: Callable[[], Server], seconds: float) -> Server:
    """A server that is ready; it is stopped if it does not become so."""
    server = None
    try:
        # A signal between the process and the name for it would leave the process running.
        with signals_held_back():
            server = make()
        server.wait(seconds)
    except BaseException:
        if server is not None:
            server.stop()
        raise
    return server


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """SIGINT and SIGTERM take effect at the end of the `with`; only in the main thread, which alone handles signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in arrived[:1]:
        signal.raise_signal(number)


def empty_cache(urls: Sequence[str]) -> bool:
    """Drops every cached page of idle servers of this project; False for others, which have no such endpoint."""
    for url in urls:
        for _ in range(100):
            try:
                answer = httpx.post(f"{root(url)}/flush_cache", timeout=30, trust_env=False)
            except httpx.HTTPError:
                return False
            if answer.status_code != 200 or "flushed_pages" not in answer.text:
                return False
            if not answer.json()["flushed_pages"]:
                break
            # The last sequences' pages may still be on their way back.
            time.sleep(0.05)
    return True


def counters(urls: Sequence[str]) -> dict[str, float]:
    """The counters of `COUNTERS` that the servers report, summed; those of unreachable servers are left out."""
    totals: dict[str, float] = {}
    for url in urls:
        try:
            answer = httpx.get(f"{root(url)}/metrics", timeout=30, trust_env=False)
            families = list(text_string_to_metric_families(answer.text)) if answer.status_code == 200 else []
        except (httpx.HTTPError, ValueError):
            continue
        for family in families:
            if family.name in COUNTERS:
                values = [sample.value for sample in family.samples if sample.name.endswith("_total")]
                totals[family.name] = totals.get(family.name, 0.0) + sum(values)
    return totals


def root(url: str) -> str:
    """The server's own address, without the API's path."""
    return url.rstrip("/").removesuffix("/v1")
