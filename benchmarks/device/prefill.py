"""Prefill of one sequence in chunks, by the base's own weights: tokens a second and MFU."""

from typing import Any

import numpy as np

from benchmarks.device import counts
from benchmarks.device.check import Cell, Check
from benchmarks.device.models import RandomPool, random_model
from benchmarks.device.sizes import PAGE
from benchmarks.device.timing import median_seconds
from pshare_jax.engine.shapes import padded_batch, pages_for
from pshare_jax.share.model import Weights


def run(check: Check) -> None:
    """Each length."""
    config, longest = check.config, max(check.sizes.prefill)
    needed = check.item * counts.all_weights(config) + counts.kv_bytes(config, check.item) * longest
    if not check.has_room(f"{longest} tokens", needed):
        return
    model = random_model(config, check.mesh, check.dtype)
    pool = RandomPool(config, check.mesh, check.dtype, 1 + pages_for(longest, PAGE))
    for length in check.sizes.prefill:
        check.measure(f"{length} tokens", lambda length=length: _one(check, model.prefill_only(), pool, length))


def _one(check: Check, weights: Weights, pool: RandomPool, length: int) -> Cell:
    pages = list(range(1, pool.num_pages))
    ids = np.random.default_rng(0).integers(0, check.config.vocab_size, length).tolist()
    chunks, work = [], counts.Work(0.0, 0.0)
    for start in range(0, length, check.sizes.chunk):
        new = ids[start : start + check.sizes.chunk]
        chunks.append(padded_batch((1, len(new)), len(pages), [(pages, start, new, 0)]))
        work += counts.prefill(check.config, start, len(new), check.item)

    def prefill() -> Any:
        return [pool.run(weights.paged.prefill, weights.params, *chunk) for chunk in chunks][-1]

    seconds = median_seconds(prefill, check.sizes.runs)
    mfu = None if check.peaks.flops is None else work.flops / seconds / check.peaks.flops
    return check.timed(seconds, work, tokens_s=length / seconds, mfu=mfu)
