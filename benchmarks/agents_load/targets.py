"""Where a config's runs go: servers of this project's checkouts, or URLs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.agents_load.config import BenchConfig
from benchmarks.agents_load.machine import available_mib
from benchmarks.agents_load.servers import Checkout, Server, started

ROOM = 1.15
"""A server is started beside others if this many times the largest one's memory is free."""


@dataclass(frozen=True)
class Target:
    """Where runs go: what kind of server (shared, isolated, a URL's label), whose, and its URL or one for each model."""

    kind: str
    checkout: str
    url: str | dict[str, str]
    server: Server | None = None

    @property
    def urls(self) -> list[str]:
        """Its distinct URLs."""
        return [self.url] if isinstance(self.url, str) else sorted(set(self.url.values()))

    def check(self) -> None:
        """Raises PshareError if it was started here and has ended."""
        if self.server is not None:
            self.server.check()

    def memory_mib(self) -> int | None:
        """The most memory that a server started here has held."""
        return None if self.server is None else self.server.memory_mib()


class Targets:
    """The targets of one kind. Servers are started and warmed up (`warm`) when they are first used, and kept running: only
    where there is no memory for one more are the others stopped first, to be started again at their turn.

    A context manager, which stops all of them.
    """

    def __init__(
        self,
        config: BenchConfig,
        kind: str,
        checkouts: Sequence[Checkout],
        modules: Mapping[str, str],
        folder: Path,
        warm: Callable[[Target], None],
        say: Callable[[str], None],
    ):
        self._config, self._kind, self._modules, self._folder = config, kind, modules, folder
        self._checkouts = {checkout.name: checkout for checkout in checkouts}
        self._warm, self._say = warm, say
        self._running: dict[str, Target] = {}
        self._largest_mib = 0

    @property
    def names(self) -> list[str]:
        """What `get` takes: the checkouts' names, or nothing but "" for URLs."""
        return [""] if self._config.urls else list(self._checkouts)

    def get(self, name: str) -> Target:
        """A target that is warm.

        Raises:
            PshareError: its server does not start, or its warm-up fails.
        """
        if name not in self._running:
            target = Target(self._kind, "", self._config.urls[self._kind]) if not name else self._started(name)
            self._running[name] = target
            self._warm(target)
        return self._running[name]

    def _started(self, name: str) -> Target:
        self._make_room()
        folder = self._folder / f"{self._kind}-{name}"
        serve = {"base": self._config.base, "tasks": dict(self._modules), "sharing": self._kind}
        begin = time.monotonic()
        self._say(f"starting {self._kind} of {name}; its log is {folder}/server.log")
        server = started(
            lambda: Server(self._checkouts[name], serve, self._config.serve, folder), self._config.start_seconds
        )
        self._say(f"all programs are compiled after {time.monotonic() - begin:.0f} s")
        return Target(self._kind, name, f"{server.url}/v1", server)

    def _make_room(self) -> None:
        for target in self._running.values():
            self._largest_mib = max(self._largest_mib, target.memory_mib() or 0)
        free = available_mib()
        if self._running and free is not None and free < ROOM * self._largest_mib:
            self._say(f"stopping the other server: {free:,} MiB are free, one needs {self._largest_mib:,}")
            self._stop()

    def _stop(self) -> None:
        """Stops all servers; an interrupted stop does not keep the others running."""
        if self._running:
            _, target = self._running.popitem()
            try:
                if target.server is not None:
                    target.server.stop()
            finally:
                self._stop()

    def __enter__(self) -> "Targets":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
