"""An engine of a random model in this process, with few compiled shapes, so that it starts in seconds."""

from collections.abc import Mapping
from typing import Any, Literal

from benchmarks.device.sizes import PAGE
from pshare_jax.engine.config import BatchConfig, EngineConfig, KVConfig, LimitsConfig, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.shapes import Shape
from pshare_jax.engine.warmup import Variant, compile_all, variants
from pshare_jax.share.model import Model


def make_engine(
    model: Model,
    tasks: Mapping[str, Any],
    sharing: Literal["shared", "isolated"],
    *,
    pages: int,
    chunk: int,
    rows: int | None,
) -> Engine:
    """An engine on the first device: the pages of all its pools, most tokens of a chunk, decode rows (None: the platform's)."""
    config = EngineConfig(
        tasks=tasks,
        sharing=sharing,
        placement=placed([[0]], [[0]]),
        kv=KVConfig(PAGE, pages),
        batch=BatchConfig(chunk, "auto" if rows is None else rows),
        limits=LimitsConfig(stall_seconds=600.0),
    )
    return Engine.build(model, config)


def compile_only(engine: Engine, shapes: frozenset[Shape]) -> list[Variant]:
    """Compiles and runs the programs of these shapes once, and those that move pages; steps use no other shapes."""
    programs = [program for program in variants(engine) if program.shape is None or program.shape in shapes]
    compile_all(programs)
    for worker in engine.workers:
        worker.compiled.limit(shapes)
        worker.compiled.settle()
        while worker.warm_up():
            pass
    return programs
