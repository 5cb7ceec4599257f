"""Host time of the engine, without a model: of a decode step by context length and waiting requests, and of a submission.

    python -m benchmarks.host [--rows 64] [--contexts 128 2048 8192] [--waiting 0 200 2000] [--json FILE]

Steps return at once (tests/helpers has the fakes), so all that is measured is Python. "steady" steps only decode; in "churn"
every answer has 16 tokens, so that requests end, are admitted and prefilled all the time. Prompts have nothing in common.
Times are CPU times of the thread, the smallest of three parts of a run, since other processes can only lengthen them.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import common
from pshare_jax.engine.request import Request
from pshare_jax.model.paged_batch import DecodeBatch

PAGE, CHUNK, ANSWER, STEPS, PARTS = 16, 512, 16, 20, 3
DONE = SimpleNamespace(is_ready=lambda: True, block_until_ready=lambda: None)
SUBMITTED = (1_024, 8_192, 32_768, 131_072)


class World:
    """An engine whose device steps cost nothing."""

    def __init__(self, rows: int, context: int, waiting: int):
        from fake_engine import make_engine

        pages = (2 * rows + 8) * (context // PAGE + 20)
        most = 3 * rows + waiting + 8
        self.fakes = make_engine(
            {"t": [65]},
            page_size=PAGE, pages=pages, chunk=CHUNK, rows=rows, max_len=max(context, 1024) + 2048, max_requests=most,
            colocated=True, debug=False,
        )  # fmt: skip
        self.engine, self.num_steps, self.asked = self.fakes.engine, 0, 0.0
        for store in self.fakes.decode_stores:
            store.run = self._run
        self._context, self._draw, self._names = context, np.random.default_rng(0), itertools.count()

    def _run(self, step: Callable[..., Any], params: Any, tokens: Any, rows: Any) -> Any:
        if not isinstance(tokens, DecodeBatch):
            return DONE
        self.num_steps += 1
        logits = np.zeros((len(tokens.slots), 260), np.float32)
        logits[:, 65] = 1
        return logits, rows

    def ask(self, max_tokens: int, on_event: Callable[[Any], None] = lambda event: None) -> None:
        """Submits a request with a prompt of its own."""
        prompt = tuple(self._draw.integers(0, 250, self._context).tolist())
        self.engine.submit(Request(f"r{next(self._names)}", "t", prompt, max_tokens), on_event)

    def time_steps(self) -> float:
        """Microseconds of a decode step, with all that happens between two of them."""
        times = []
        for _ in range(PARTS):
            before, began, asked = self.num_steps, time.thread_time(), self.asked
            while self.num_steps < before + STEPS:
                # Deadlines are checked by a thread of their own, twice a second.
                self.engine._step_workers()
            times.append((time.thread_time() - began - self.asked + asked) / STEPS)
        return min(times) * 1e6


def steady(rows: int, context: int, waiting: int) -> float:
    """Microseconds of a step while nothing ends."""
    world = World(rows, context, waiting)
    for _ in range(2 * rows + waiting):
        world.ask(2048)
    while sum(map(len, world.engine.admission.prefilling)) or not world.num_steps:
        world.engine.step()
    return world.time_steps()


def churn(rows: int, context: int, waiting: int) -> float:
    """Microseconds of a step while answers of 16 tokens end and others begin; submissions do not count."""
    world = World(rows, context, waiting)

    def again(event: Any) -> None:
        if event.last:
            ended.append(event)

    ended: list[Any] = []
    for _ in range(2 * rows + waiting):
        world.ask(ANSWER, again)
    run = world.engine._step_workers

    def step() -> bool:
        done, began = run(), time.thread_time()
        for _ in ended:
            world.ask(ANSWER, again)
        ended.clear()
        world.asked += time.thread_time() - began
        return done

    world.engine._step_workers = step
    world.time_steps()
    return world.time_steps()


def submission(length: int) -> dict[str, float]:
    """Microseconds of the submission of a prompt of so many tokens, and of the same with 80 tokens more in its session."""
    world = World(1, length, 0)
    draw = np.random.default_rng(1)
    times = {"first": [], "next": []}
    for turn in range(5):
        prompt = draw.integers(0, 250, length).tolist()
        for name, ids in (("first", prompt), ("next", prompt + [1] * 80)):
            request = Request(f"{name}{turn}", "t", tuple(ids), 1, session=f"session {turn}")
            began = time.thread_time()
            world.engine.submit(request, lambda event: None)
            times[name].append((time.thread_time() - began) * 1e6)
            world.engine.abort(request.id)
    return {name: min(seconds) for name, seconds in times.items()}


def main() -> None:
    """Runs the command."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 200, 2000])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {"rows": args.rows, "steps": [], "submissions": []}
    steps = common.table(f"microseconds of a step of {args.rows} rows", ["context", "waiting", "steady", "churn"])
    for context, waiting in itertools.product(args.contexts, args.waiting):
        times = [kind(args.rows, context, waiting) for kind in (steady, churn)]
        results["steps"].append({"context": context, "waiting": waiting, "steady": times[0], "churn": times[1]})
        steps.add_row(str(context), str(waiting), *(f"{seconds:.0f}" for seconds in times))
    submissions = common.table("microseconds of a submission", ["tokens", "first", "next in the session"])
    for length in SUBMITTED:
        times = submission(length)
        results["submissions"].append({"tokens": length, **times})
        submissions.add_row(str(length), *(f"{seconds:.0f}" for seconds in times.values()))
    Console().print(steps)
    Console().print(submissions)
    common.save(results, args.json)


if __name__ == "__main__":
    main()
