"""All runs of a config: server by server, point by point, repetition by repetition.

For each kind of server (shared, isolated, or a URL) every second repetition takes checkouts and points in reverse order
(A B, B A, ...), so that what else the machine does disturbs all alike. All servers but one are idle at any time. Every run
begins with an empty cache and prompts that the server has not seen, and sends the same prompts to every server.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.agents_load.client import Client
from benchmarks.agents_load.config import BenchConfig, Numbers, Point, points, seeded, targets_of
from benchmarks.agents_load.runner import Run, play
from benchmarks.agents_load.servers import Checkout, counters, empty_cache
from benchmarks.agents_load.statistics import summarize
from benchmarks.agents_load.targets import Target, Targets
from benchmarks.agents_load.tasks import task_modules
from benchmarks.agents_load.traces import read_trace, write_trace
from benchmarks.agents_load.workload import Session, make_sessions, with_arrivals
from pshare_jax.errors import PshareError

WARM_UP_SEED = 999
"""The repetition whose prompts the warm-up takes; no run has it."""
TRACE_BLOCK = 16
"""Tokens of a hash id in written traces: a page, so that a replay shares what the run shared."""


class Campaign:
    """Runs configs one after another; `save` is called with all runs so far after each."""

    def __init__(
        self,
        checkouts: Sequence[Checkout],
        folder: Path,
        console: Console,
        progress: Progress,
        save: Callable[[list[Numbers]], None],
        trace: Path | None = None,
    ):
        self._checkouts = {checkout.name: checkout for checkout in checkouts}
        self._folder, self._console, self._progress = folder, console, progress
        self._save, self._trace = save, trace
        self.runs: list[Numbers] = []

    def run(self, name: str, config: BenchConfig) -> None:
        """All runs of a config."""
        kinds = targets_of(config, list(self._checkouts))
        calls = config.repetitions * sum(num_calls(config, point) for point in points(config))
        total = calls * sum(map(len, kinds.values()))
        task = self._progress.add_task(name, total=total)
        modules: dict[str, str] = {}
        if not config.urls:
            modules = task_modules(config.base, config.tasks.kind, config.tasks.models, self._folder / "modules")

        def say(line: str) -> None:
            self._console.print(f"{name}: {line}")

        def warm(target: Target) -> None:
            seconds = self._warm_up(config, target)
            here, all_runs = (count * seconds / 60 for count in (calls, total))
            say(
                f"{seconds:.2f} s a call alone; so {calls:,} calls here take {here:.0f} min, and all {total:,} {all_runs:.0f}"
            )

        for kind, names in kinds.items():
            checkouts = [self._checkouts[one] for one in names if one]
            with Targets(config, kind, checkouts, modules, self._folder / name, warm, say) as targets:
                self._run_kind(name, config, targets, task)

    def _run_kind(self, name: str, config: BenchConfig, targets: Targets, task: TaskID) -> None:
        for repetition in range(config.repetitions):
            turn = slice(None, None, -1 if repetition % 2 else 1)
            for checkout in targets.names[turn]:
                target = targets.get(checkout)
                for point in points(config)[turn]:
                    self._progress.update(task, description=f"{name} {target.kind} {checkout} {point.name}")
                    numbers = self._measure(name, config, target, point, repetition, task)
                    self.runs.append(numbers)
                    self._save(self.runs)
                    self._console.print(f"{name} {_line(numbers)}")

    def _warm_up(self, config: BenchConfig, target: Target) -> float:
        """Runs one session alone; returns its seconds a call."""
        point = points(config)[0]
        session = make_sessions(config.workload, _called(config, point), seeded(config, point, WARM_UP_SEED))[0]
        run = asyncio.run(_played(config, target, [session], 1, False, lambda record: None))
        target.check()
        failed = next((call for call in run.calls if call.failure is not None), None)
        if failed is not None:
            raise PshareError(f"The warm-up of {target.kind} failed: {failed.failure}: {failed.detail}")
        return sum(call.seconds for call in run.calls) / len(run.calls)

    def _measure(
        self, name: str, config: BenchConfig, target: Target, point: Point, repetition: int, task: TaskID
    ) -> Numbers:
        sessions = sessions_of(config, point, repetition)
        emptied = empty_cache(target.urls)
        before = counters(target.urls)
        at_once = point.at_once or config.load.most_at_once
        run = asyncio.run(
            _played(config, target, sessions, at_once, point.at_once is None, lambda _: self._progress.advance(task))
        )
        target.check()
        after = counters(target.urls)
        if self._trace is not None and not self.runs:
            sent = [(call.session, call.began - run.began, call.call) for call in run.calls]
            write_trace(self._trace, sent, config.trace.block_size if config.trace else TRACE_BLOCK)
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        head: Numbers = {"config": name, "kind": target.kind, "checkout": target.checkout, "point_name": point.name}
        head["repetition"] = repetition
        self._write_calls(head, run)
        conditions = {"point": asdict(point), "began_empty": emptied, "server_memory_mib": target.memory_mib()}
        return {**head, **conditions, **with_counters(summarize(run), grown)}

    def _write_calls(self, head: Numbers, run: Run) -> None:
        # The first run begins the file anew.
        with (self._folder / "calls.jsonl").open("a" if self.runs else "w") as file:
            for call in run.calls:
                file.write(json.dumps({**head, **call.numbers(run.began)}) + "\n")


def num_calls(config: BenchConfig, point: Point) -> int:
    """The calls of one run."""
    return sum(len(session.calls) for session in sessions_of(config, point, 0))


def sessions_of(config: BenchConfig, point: Point, repetition: int) -> list[Session]:
    """The sessions of one run."""
    seed, models = seeded(config, point, repetition), _called(config, point)
    if config.trace is not None:
        vocab_size, file = config.workload.vocab_size, Path(config.trace.file)
        return read_trace(file, config.trace.block_size, vocab_size, seed, models)
    sessions = make_sessions(config.workload, models, seed)
    return sessions if point.rate is None else with_arrivals(sessions, point.rate, seed)


def with_counters(numbers: Numbers, grown: dict[str, float]) -> Numbers:
    """The numbers, and tokens prefilled a session as the answers' usage and, if known, the server's counters say."""
    sessions = max(numbers["sessions"], 1)
    more: dict[str, Any] = {"prefilled_per_session": numbers["prefilled_tokens"] / sessions, "counters": grown}
    if (prefilled := grown.get("pshare_prefilled_tokens")) is not None:
        more["server_prefilled_per_session"] = prefilled / sessions
    return {**numbers, **more}


def _called(config: BenchConfig, point: Point) -> list[str]:
    return config.tasks.models[: point.num_tasks]


async def _played(
    config: BenchConfig,
    target: Target,
    sessions: list[Session],
    at_once: int,
    arrivals: bool,
    on_call: Callable[[object], None],
) -> Run:
    chat = config.api == "chat"
    async with Client(target.url, chat=chat, api_key=config.api_key, call_seconds=config.call_seconds) as client:
        return await play(client, sessions, at_once, arrivals, on_call)


def _line(numbers: Numbers) -> str:
    """A run's line, printed when it ends."""
    latency = numbers["call_s"] or {}
    text = f"{numbers['kind']} {numbers['checkout']} {numbers['point_name']} #{numbers['repetition'] + 1}: "
    text += f"{numbers['calls_per_s']:.3f} calls/s, p95 {latency.get('p95', float('nan')):.2f} s, "
    text += f"{numbers['prefilled_per_session']:,.0f} tokens prefilled a session, in {numbers['duration_s']:.0f} s"
    failures = ", ".join(f"{count} x {name}" for name, count in numbers["failures"].items())
    return text + (f"; FAILED: {failures}" if failures else "")
