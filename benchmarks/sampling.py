"""The sampler's call alone, by what a batch asks for: milliseconds for 1, 8 and 16 rows, on random logits.

    python -m benchmarks.sampling [--against CHECKOUT] [--vocab 49152] [--runs 30] [--json FILE]

Each time is the least of many runs, which alternate between all cases. `--against` also times `sample_rows` of another
checkout, with the adjustments of penalties sent from the host as `[B, V]`, as its engine did. A wide nucleus has more tokens
than the sampler ranks.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from benchmarks import common
from pshare_jax.engine.request import Request
from pshare_jax.engine.sampler import Sampler
from pshare_jax.engine.sequence import DecodeProgress, Sequence
from pshare_jax.mesh import make_mesh
from pshare_jax.sampling.params import SamplingParams, all_allowed, sampling_rows

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "wide nucleus": {"temperature": 0.8, "top_p": 0.95},
    "penalties": {"frequency_penalty": 0.3},
    "logprobs": {},
}
ROWS = (1, 8, 16)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--against", type=Path, help="another checkout, timed in the same run")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--runs", type=int, default=30)
    options = parser.parse_args(arguments)
    sampler, old = Sampler(make_mesh([0]), options.vocab, max(ROWS)), options.against and old_sampling(options.against)
    steps: dict[tuple[str, int, str], Callable[[], Any]] = {}
    for rows in ROWS:
        for name in CASES:
            logits = _logits(rows, options.vocab, 3 if name == "wide nucleus" else 8)
            steps[name, rows, "ms"] = _step(sampler, logits, name)
            if old is not None:
                steps[name, rows, "ms before"] = _old_step(old, logits, name)
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(options.runs):
        for key, step in steps.items():
            start = time.perf_counter()
            step()
            best[key] = min(best[key], 1000 * (time.perf_counter() - start))
    report(best)
    common.save([[*key, round(value, 3)] for key, value in best.items()], options.json)


def report(best: dict[tuple[str, int, str], float]) -> None:
    """Prints the times, a row for each kind of batch."""
    columns = list(dict.fromkeys((rows, what) for _, rows, what in best))
    table = common.table("sampling", ["batch", *[f"{rows} rows, {what}" for rows, what in columns]])
    for name in CASES:
        table.add_row(name, *[f"{best[name, rows, what]:.2f}" for rows, what in columns])
    Console().print(table)


def old_sampling(checkout: Path) -> Any:
    """The module sampling/sample.py of a checkout."""
    spec = importlib.util.spec_from_file_location("old_sample", checkout / "pshare_jax/sampling/sample.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _logits(rows: int, size: int, deviation: float) -> jax.Array:
    values = np.random.default_rng(0).normal(0, deviation, (rows, size)).astype(np.float32)
    return jax.block_until_ready(jax.device_put(values))


def _params(name: str, row: int) -> SamplingParams:
    return SamplingParams(seed=row, **CASES[name])


def _step(sampler: Sampler, logits: jax.Array, name: str) -> Callable[[], Any]:
    count, rows, batch = len(logits), sampler.new_rows(sampler.num_slots), []
    for slot in range(count):
        sequence = Sequence.__new__(Sequence)
        sequence.request = Request("", "", (1,), 1, _params(name, slot), logprobs=5 if name == "logprobs" else None)
        sequence.matcher, sequence.decode = None, DecodeProgress()
        rows.join(slot, sequence)
        batch.append(sequence)
    return lambda: rows.prepare(batch, range(count), [9] * count, count)(logits).fetch()


def _old_step(old: Any, logits: jax.Array, name: str) -> Callable[[], Any]:
    sample, shape = jax.jit(old.sample_rows), logits.shape
    flags = [
        np.array(flag)
        for flag in (bool(CASES[name].get("temperature")), name == "penalties", False, name == "logprobs")
    ]
    settings, masks = [_params(name, row) for row in range(len(logits))], jax.device_put(all_allowed(*shape))
    placed = jax.device_put(old.Adjustments(np.zeros(shape, np.float32), np.zeros(shape, bool)))

    def step() -> Any:
        rows, adjustments = sampling_rows(settings, [9] * len(logits), len(logits)), placed
        if name == "penalties":
            adjustments = jax.device_put(old.Adjustments(np.zeros(shape, np.float32), np.zeros(shape, bool)))
        sampled = sample(logits, rows, adjustments, masks, *flags)
        return jax.device_get(sampled if name == "logprobs" else sampled.ids)

    return step


if __name__ == "__main__":
    main()
