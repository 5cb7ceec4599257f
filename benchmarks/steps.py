"""Host time of a decode step on a real device, without what the device computes: 32 rows of the tests' tiny model.

    python -m benchmarks.steps [--rows 32] [--contexts 128 2048 8192] [--json FILE]

The worker's turns are timed from outside, and in them the calls into JAX: "dispatch" is the time in the calls of the step's
programs, "wait" that in the fetch of the step before (with `batch.pipelined: false`: of the same step). "host" is the rest:
what Python does between two decode steps. Medians of 200 turns; CPU is that of the worker's thread.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

from benchmarks import common
from pshare_jax.engine.config import BatchConfig, EngineConfig, KVConfig, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Request
from pshare_jax.model.paged_batch import DecodeBatch

PAGE, TURNS = 16, 200


class Clock:
    """Seconds in calls, by name, since the last `reset`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def reset(self) -> None:
        """All counts are zero."""
        self.seconds = {"dispatch": 0.0, "wait": 0.0}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, whose time is counted."""

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return timed


def instrument(engine: Engine, clock: Clock) -> None:
    """Counts the calls of decode programs and the fetches of all decode workers."""
    for pool in engine.pools:
        run, decode = pool.store.run, clock.timed("dispatch", pool.store.run)
        pool.store.run = lambda step, params, tokens, rows, run=run, decode=decode: (
            decode if isinstance(tokens, DecodeBatch) else run
        )(step, params, tokens, rows)
    for spec in engine.decode_specs:
        calls: Any = spec.sampler
        calls.calls = calls.calls._replace(sample=clock.timed("dispatch", calls.calls.sample))


def measure(folder: Path, rows: int, context: int, pipelined: bool) -> dict[str, float]:
    """Microseconds of a turn in which every row decodes."""
    import pshare_jax
    from pshare_jax.engine import sampler

    model = pshare_jax.load(folder)
    pages = KVConfig(PAGE, rows * (context // PAGE + 40) + 8)
    batch = BatchConfig(512, rows, pipelined)
    engine = common.warm_engine(
        model, EngineConfig(tasks={"chat": "base"}, placement=placed([[0]], [[0]]), kv=pages, batch=batch)
    )
    draw, clock = np.random.default_rng(0), Clock()
    for number in range(rows):
        prompt = tuple(draw.integers(0, 300, context).tolist())
        engine.submit(Request(f"r{number}", "chat", prompt, 2 * TURNS), lambda event: None)
    admission, (worker,) = engine.admission, engine.decode_workers
    while len(admission.decoding[0]) < rows:
        engine.step()
    instrument(engine, clock)
    times: dict[str, list[float]] = {"turn": [], "host": [], "dispatch": [], "wait": [], "cpu": []}
    with mock.patch.object(sampler.Pending, "fetch", clock.timed("wait", sampler.Pending.fetch)):
        for _ in range(TURNS):
            clock.reset()
            began, cpu = time.perf_counter(), time.thread_time()
            worker.step()
            times["cpu"].append(time.thread_time() - cpu)
            times["turn"].append(time.perf_counter() - began)
            times["host"].append(times["turn"][-1] - sum(clock.seconds.values()))
            for name, seconds in clock.seconds.items():
                times[name].append(seconds)
    engine.abort_all()
    return {name: statistics.median(seconds) * 1e6 for name, seconds in times.items()}


def main() -> None:
    """Runs the command."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    from tiny import tiny_folder

    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    shown = common.table(
        f"microseconds of a decode turn, {args.rows} rows",
        ["context", "pipelined", "turn", "host", "dispatch", "wait", "CPU"],
    )
    with tempfile.TemporaryDirectory() as folder:
        longest = max(args.contexts) + 2 * TURNS + PAGE
        base = tiny_folder("llama", Path(folder) / "base", max_position_embeddings=longest)
        for context in args.contexts:
            for pipelined in (True, False):
                times = measure(base, args.rows, context, pipelined)
                results.append({"context": context, "pipelined": pipelined, **times})
                shown.add_row(str(context), str(pipelined), *(f"{value:.0f}" for value in times.values()))
    Console().print(shown)
    common.save(results, args.json)


if __name__ == "__main__":
    main()
