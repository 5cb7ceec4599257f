"""The device's own peaks: the FLOP/s of a large product of matrices, and the bandwidth of a copy."""

import jax
import jax.numpy as jnp

from benchmarks.device.cards import Peaks
from benchmarks.device.check import Cell, Check
from benchmarks.device.counts import Work
from benchmarks.device.timing import median_seconds


def run(check: Check) -> None:
    """Measures both. Where the kind of device is unknown, later parts are compared with these."""
    product = check.measure("product of two square matrices", lambda: _product(check))
    copied = check.measure("copy", lambda: _copy(check))
    if check.peaks.flops is None and product is not None and copied is not None:
        check.peaks = Peaks(product["tflops"] * 1e12, copied["gb_s"] * 1e9)


def _product(check: Check) -> Cell:
    size = check.sizes.matmul
    a, b = (jax.random.normal(jax.random.key(seed), (size, size), check.dtype) for seed in range(2))
    product = jax.jit(jnp.matmul)
    seconds = median_seconds(lambda: product(a, b), check.sizes.runs)
    work = Work(2.0 * size**3, 3.0 * size**2 * check.item)
    return check.timed(seconds, work, tflops=work.flops / seconds / 1e12)


def _copy(check: Check) -> Cell:
    source = jax.random.normal(jax.random.key(0), (check.sizes.copy_bytes // check.item,), check.dtype)
    negated = jax.jit(jnp.negative)
    seconds = median_seconds(lambda: negated(source), check.sizes.runs)
    work = Work(0.0, 2.0 * source.nbytes)
    return check.timed(seconds, work, gb_s=work.num_bytes / seconds / 1e9)
