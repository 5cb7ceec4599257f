"""How long calls on a device take: each is waited for, a first one warms up, the median counts."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def median_seconds(call: Callable[[], Any], runs: int) -> float:
    """Median seconds until the result of `call` is ready, over `runs` calls after one that compiles and warms up."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
