"""The start of an engine with the platform's own shapes: its programs, and the seconds until it could answer."""

import time

from benchmarks.device import counts
from benchmarks.device.check import Cell, Check
from benchmarks.device.engine import make_engine
from benchmarks.device.models import random_adapter, random_model
from benchmarks.device.sizes import PAGE
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.shapes import pages_for
from pshare_jax.engine.warmup import compile_all, variants

TOKENS = 16_384
"""Tokens that the pool holds."""


def run(check: Check) -> None:
    """The small programs, after which a server answers, and then all, if there seems to be time."""
    if not check.has_room("small programs", 1.5 * check.item * counts.all_weights(check.config)):
        return
    model = random_model(check.config, check.mesh, check.dtype)
    tasks = {"base": "base", "lora": random_adapter(model, 1)}
    pages = 1 + pages_for(TOKENS, PAGE)
    engine = make_engine(model, tasks, "shared", pages=pages, chunk=check.sizes.chunk, rows=check.sizes.start_rows)
    small = check.measure("small programs", lambda: _compile(engine, small=True))
    if small is not None and check.sizes.start_all:
        rest = sum(not program.small for program in variants(engine))
        check.longest = small["wall_s"] / small["compiled"] * rest
        check.measure("all others", lambda: _compile(engine, small=False))


def _compile(engine: Engine, *, small: bool) -> Cell:
    programs = [program for program in variants(engine) if program.small == small]
    began = time.perf_counter()
    compile_all(programs)
    return {"compiled": len(programs), "wall_s": time.perf_counter() - began}
