"""Compiles every program that a running engine calls ahead of time: the smallest before the server starts answering.

A worker's first call uses the program compiled here. Called by the server's startup and task loader, and benchmarks.
"""

import functools
import itertools
import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pshare_jax.engine import scoring
from pshare_jax.engine.config import resolved
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import DecodeSpec, PrefillSpec, weights_of
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.shapes import CompiledShapes, Shape, padded_batch, pages_for, prefill_shapes, row_buckets
from pshare_jax.mesh import replicated
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.model.paged_steps import page_moves

logger = logging.getLogger(__name__)
SMALL_TOKENS, SMALL_ROWS = 64, 1
"""The server starts answering once chunks of this many tokens and decode steps of this many rows are compiled; until the
rest is compiled, longer prompts take more chunks and more sequences take turns."""


@dataclass(frozen=True)
class Variant:
    """A program: its name, whether a small warm-up compiles it, its lowering, and the shape of its step (None: it
    transfers pages).
    """

    name: str
    small: bool
    lower: Callable[[], Any]
    shape: Shape | None = None


def variants(engine: Engine) -> list[Variant]:
    """All programs of the engine's workers, each once, in the order of compiling."""
    prefill, decode = engine.prefill_specs, engine.decode_specs
    sources = {id(spec.pool): DevicePages.of(spec.pool) for spec in prefill}
    targets = {id(spec.pool): DevicePages.of(spec.pool) for spec in decode}
    programs = [
        *(_prefill(spec, engine) for spec in prefill),
        *(_decode(spec, engine) for spec in decode),
        *(_score(spec, engine) for spec in decode),
        *(_put_tables(store, engine) for store in targets.values()),
        *(_gathers(store) for store in (sources | targets).values()),
        *(_scatters(store) for store in (sources | targets).values()),
        *(_device_puts(source, target) for source, target in itertools.product(sources.values(), targets.values())),
        *(_device_puts(target, source) for source, target in itertools.product(sources.values(), targets.values())),
    ]
    found: dict[tuple, Variant] = {}
    for key, variant in itertools.chain.from_iterable(programs):
        found.setdefault(key, variant)
    return sorted(found.values(), key=_order)


def _order(variant: Variant) -> tuple[bool, int, Shape]:
    """Small programs first; then transfers and decode steps, scoring steps, prefill steps."""
    shape = variant.shape or ()
    scores = bool(shape) and isinstance(shape[0], str)
    return not variant.small, 1 if scores else 2 * (len(shape) == 2), shape


def decode_variants(spec: DecodeSpec, engine: Engine) -> list[Variant]:
    """The programs of a decode worker's steps, for all its tasks and shapes."""
    return list(dict([*_decode(spec, engine), *_score(spec, engine)]).values())


def _prefill(spec: PrefillSpec, engine: Engine) -> Iterator[tuple[tuple, Variant]]:
    weights, store = spec.weights.current, DevicePages.of(spec.pool)
    step = weights.paged.prefill
    for rows, tokens in prefill_shapes(engine.chunk_tokens):
        small = rows == 1 and tokens == min(SMALL_TOKENS, engine.chunk_tokens)
        shape = (rows, tokens)
        yield (
            ("prefill", step, shape, store.mesh, store.num_pages),
            Variant(
                f"prefill {rows}x{tokens}",
                small,
                _step_lowering(step, weights.params, store, shape, engine),
                shape,
            ),
        )


def _decode(spec: DecodeSpec, engine: Engine) -> Iterator[tuple[tuple, Variant]]:
    store = DevicePages.of(spec.pool)
    for rows in row_buckets(resolved(engine.config.batch.decode_rows)):
        small = rows == SMALL_ROWS
        for weights in weights_of(spec.tasks.values()):
            step = weights.paged.decode
            yield (
                ("decode", step, rows, store.mesh, store.num_pages),
                Variant(f"decode {rows}", small, _decode_lowering(step, weights.params, store, rows, engine), (rows,)),
            )
        yield (
            ("sample", rows, store.mesh),
            Variant(
                f"sample {rows}",
                small,
                functools.partial(spec.sampler.lower, rows),
                (rows,),
            ),
        )
    yield ("join", store.mesh), Variant("join", True, spec.sampler.lower_join)


def _put_tables(store: DevicePages, engine: Engine) -> Iterator[tuple[tuple, Variant]]:
    moves: Any = page_moves(store.config, store.mesh)
    tables = _tables(store, engine)
    lower = functools.partial(moves.put_table.lower, tables, np.int32(0), np.zeros(tables.shape[1], np.int32))
    yield ("put_table", store.mesh), Variant("page table", True, lower)


def _score(spec: DecodeSpec, engine: Engine) -> Iterator[tuple[tuple, Variant]]:
    store = DevicePages.of(spec.pool)
    # Even a short prompt needs a scoring step if it invokes an activated LoRA.
    invoked = any(engine.boundary(task).invocation for task in engine.tasks)
    for shape, weights in itertools.product((scoring.SHAPE, scoring.SHORT), weights_of(spec.tasks.values())):
        tokens, rows = scoring.no_rows(shape, pages_for(engine.facts.max_len, store.page_size))
        step = weights.paged.score
        lower = functools.partial(step.lower, _specs(weights.params), tokens, rows, store.spec)
        name = "score {}x{}".format(*tokens.shape)
        yield (
            ("score", step, shape, store.mesh, store.num_pages),
            Variant(name, invoked and shape == scoring.SHAPE, lower, shape),
        )


def _gathers(store: DevicePages) -> Iterator[tuple[tuple, Variant]]:
    moves: Any = page_moves(store.config, store.mesh)
    for num in store.move_buckets:
        lower = functools.partial(moves.gather.lower, store.spec, np.zeros(num, np.int32))
        yield ("gather", num, store.mesh, store.num_pages), Variant(f"gather {num} pages", True, lower)


def _scatters(store: DevicePages) -> Iterator[tuple[tuple, Variant]]:
    moves: Any = page_moves(store.config, store.mesh)
    for num in store.move_buckets:
        lower = functools.partial(moves.scatter.lower, store.spec, np.zeros(num, np.int32), store.content_spec(num))
        yield ("scatter", num, store.mesh, store.num_pages), Variant(f"scatter {num} pages", True, lower)


def _device_puts(source: DevicePages, target: DevicePages) -> Iterator[tuple[tuple, Variant]]:
    """JAX compiles a program for each shape to split content for a mesh of another size."""
    if source.mesh.size == target.mesh.size:
        return
    for num in source.move_buckets:
        lower = functools.partial(_DevicePut, source, target, num)
        yield ("device_put", num, source.mesh, target.mesh), Variant(f"device_put {num} pages", True, lower)


class _DevicePut:
    """A transfer between two pools' devices; a `jax.device_put` cannot be lowered, so it is run once instead."""

    def __init__(self, source: DevicePages, target: DevicePages, num: int):
        self._spec, self._target = source.content_spec(num), target

    def compile(self) -> None:
        content = jax.device_put(np.zeros(self._spec.shape, self._spec.dtype), self._spec.sharding)
        self._target.device_put(content).block_until_ready()


def _step_lowering(
    step: Any, params: Any, store: DevicePages, shape: tuple[int, int], engine: Engine
) -> Callable[[], Any]:
    tokens, rows = padded_batch(shape, pages_for(engine.facts.max_len, store.page_size))
    return functools.partial(step.lower, _specs(params), tokens, rows, store.spec)


def _decode_lowering(step: Any, params: Any, store: DevicePages, num_rows: int, engine: Engine) -> Callable[[], Any]:
    tables = _tables(store, engine)
    num_slots = tables.shape[0]
    tokens = jax.ShapeDtypeStruct((num_slots,), np.int32, sharding=tables.sharding)
    batch = DecodeBatch.empty(tokens, num_rows, num_slots - 1)
    return functools.partial(step.lower, _specs(params), batch, tables, store.spec)


def _tables(store: DevicePages, engine: Engine) -> jax.ShapeDtypeStruct:
    shape = resolved(engine.config.batch.decode_rows) + 1, pages_for(engine.facts.max_len, store.page_size)
    return jax.ShapeDtypeStruct(shape, np.int32, sharding=replicated(store.mesh))


def _specs(params: Any) -> Any:
    """Shapes alone, so that a pending compilation does not keep the weights of a removed task alive."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), params)


def largest_temporaries(programs: Iterable[Variant]) -> int:
    """Bytes that the temporaries of one program take on a device at most, by compiling the largest step of each kind."""
    steps: dict[str, list[Variant]] = {}
    for program in programs:
        if program.shape is not None:
            steps.setdefault(program.name.split()[0], []).append(program)
    largest = [max(map(_size, kind)) for kind in steps.values()]
    return max(
        _temporaries(program)
        for kind, size in zip(steps.values(), largest, strict=True)
        for program in kind
        if _size(program) == size
    )


def _temporaries(program: Variant) -> int:
    try:
        analysis = program.lower().compile().memory_analysis()
    except Exception:
        # It will be given up when the server compiles it, and smaller steps do its work.
        logger.exception("%s could not be compiled to measure its temporaries", program.name)
        return 0
    return 0 if analysis is None else analysis.temp_size_in_bytes


def _size(program: Variant) -> int:
    """The tokens of a step; scoring steps of one row and of four have equally many."""
    shape = program.shape or ()
    return scoring.SCORE_TOKENS if "score" in shape else math.prod(part for part in shape if isinstance(part, int))


def compile_all(programs: Iterable[Variant]) -> None:
    """Compiles programs, several at once: XLA compiles each on one core, without Python's lock."""
    with ThreadPoolExecutor(num_cores(), "pshare-compile") as threads:
        # In order, so that the first error is raised.
        for _ in threads.map(lambda program: program.lower().compile(), programs):
            pass


def num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BackgroundCompiler:
    """Compiles the remaining programs in threads. A shape may be used once all its programs are compiled; `wake` then
    wakes the workers. `stop` ends the threads.
    """

    def __init__(
        self,
        rest: Sequence[Variant],
        ready: Sequence[CompiledShapes],
        report: Callable[[str], None],
        wake: Callable[[], None],
    ):
        self._rest, self._ready, self._report, self._wake = rest, ready, report, wake
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pshare-compile", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the programs that are being compiled, and waits for it."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        left = Counter(variant.shape for variant in self._rest)
        # Half of the cores are for answers.
        with ThreadPoolExecutor(max(1, num_cores() // 2), "pshare-compile") as threads:
            for variant, compiled in zip(self._rest, threads.map(self._compile, self._rest), strict=True):
                if not compiled:
                    continue
                left[variant.shape] -= 1
                if variant.shape is not None and not left[variant.shape]:
                    for ready in self._ready:
                        ready.add(variant.shape)
                    self._wake()
        if self._stopping.is_set():
            return
        for ready in self._ready:
            ready.settle()
        self._report("all programs are compiled")

    def _compile(self, variant: Variant) -> bool:
        """Whether the program is compiled; one that cannot be (out of memory) is not used, workers go on with others."""
        if self._stopping.is_set():
            return False
        try:
            variant.lower().compile()
        except Exception:
            logger.exception("%s could not be compiled", variant.name)
            return False
        return True
