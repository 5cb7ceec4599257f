"""Decode steps of a batch over random pages: milliseconds, and the share of what the memory's bandwidth allows.

Steps follow one another without waiting, as the engine's do; each row has pages of its own and one of the LoRA adapters.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import counts
from benchmarks.device.check import Cell, Check
from benchmarks.device.models import RandomPool, random_model, with_adapters
from benchmarks.device.sizes import PAGE, RANK
from benchmarks.device.timing import median_seconds
from pshare_jax.engine.shapes import pages_for
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.share.model import Weights


def run(check: Check) -> None:
    """Every number of adapters, rows and tokens of context; one program serves all contexts."""
    sizes = check.sizes
    longest = max(sizes.decode_contexts)
    fitting = [rows for rows in sizes.decode_rows if check.has_room(f"{rows} rows at {longest}", _needed(check, rows))]
    if not fitting:
        return
    pool = RandomPool(check.config, check.mesh, check.dtype, 1 + max(fitting) * pages_for(longest + 1, PAGE))
    # Each call's model is gone before the next is made.
    _model(check, pool, fitting, None, sizes.decode_tasks)
    _model(check, pool, fitting, "int8", sizes.decode_tasks[:1])


def _model(
    check: Check, pool: RandomPool, fitting: Sequence[int], weights: Literal["int8"] | None, numbers: Sequence[int]
) -> None:
    """A model with weights in this form and these numbers of tasks, at all rows and contexts."""
    model = random_model(check.config, check.mesh, check.dtype, weights=weights)
    for tasks in numbers:
        for rows, context in itertools.product(fitting, check.sizes.decode_contexts):
            _one(check, with_adapters(model, tasks), pool, rows, context)


def _needed(check: Check, rows: int) -> float:
    """Bytes of weights and of the KV of so many rows at the longest context."""
    kv = counts.kv_bytes(check.config, check.item) * rows * max(check.sizes.decode_contexts)
    return check.item * counts.all_weights(check.config) + kv


def _one(check: Check, weights: Weights, pool: RandomPool, rows: int, context: int) -> None:
    stack = weights.architecture.build.stack
    assert stack is not None
    tasks, int8 = f"{stack.slots} LoRA task{'s' if stack.slots > 1 else ''}", weights.architecture.weights

    def make() -> Cell:
        seconds = _step_seconds(check, weights, pool, rows, context)
        work = counts.decode(check.config, rows, context, check.item, stack.slots, RANK, 1 if int8 else None)
        return check.timed(seconds, work, tokens_s=rows / seconds)

    check.measure(f"{rows} rows at {context}, {tasks}{', int8 weights' if int8 else ''}", make)


def _step_seconds(check: Check, weights: Weights, pool: RandomPool, rows: int, context: int) -> float:
    row_pages = pages_for(max(check.sizes.decode_contexts) + 1, PAGE)
    ids = 1 + np.random.default_rng(0).permutation(rows * row_pages).astype(np.int32).reshape(rows, row_pages)
    tables = [jnp.asarray(np.concatenate([ids, np.zeros((1, row_pages), np.int32)]))]
    batch = DecodeBatch.empty(jnp.full(rows + 1, 7, jnp.int32), rows, rows)
    stack = weights.architecture.build.stack
    for row in range(rows):
        batch.fill(row, row, context, ids[row, context // PAGE], 1 + row % (stack.slots if stack else 1))

    def step() -> jax.Array:
        logits, tables[0] = pool.run(weights.paged.decode, weights.params, batch, tables[0])
        return logits

    count = check.sizes.decode_steps
    return median_seconds(lambda: [step() for _ in range(count)][-1], check.sizes.runs) / count
