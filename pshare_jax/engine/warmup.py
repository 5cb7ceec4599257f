"""Compiles every program that a running engine calls ahead of time: the smallest before the server starts answering.

A worker's first call uses the program compiled here. Called by the server's startup and task loader, and benchmarks.
"""

import functools
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pshare_jax.engine import scoring
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.interfaces import DecodeSpec, PrefillSpec, weights_of
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.shapes import CompiledShapes, Shape, padded_batch, pages_for, prefill_shapes, row_buckets
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
    step, store = spec.weights.paged.prefill, DevicePages.of(spec.pool)
    for rows, tokens in prefill_shapes(engine.chunk_tokens):
        small = rows == 1 and tokens == min(SMALL_TOKENS, engine.chunk_tokens)
        shape = (rows, tokens)
        yield (
            ("prefill", step, shape, store.mesh, store.num_pages),
            Variant(
                f"prefill {rows}x{tokens}",
                small,
                _step_lowering(step, spec.weights.params, store, shape, engine),
                shape,
            ),
        )


def _decode(spec: DecodeSpec, engine: Engine) -> Iterator[tuple[tuple, Variant]]:
    store = DevicePages.of(spec.pool)
    for rows in row_buckets(engine.config.batch.decode_rows):
        small = rows == SMALL_ROWS
        for weights in weights_of(spec.tasks.values()):
            step = weights.paged.decode
            yield (
                ("decode", step, rows, store.mesh, store.num_pages),
                Variant(
                    f"decode {rows}", small, _step_lowering(step, weights.params, store, (rows, 1), engine), (rows,)
                ),
            )
        yield (
            ("sample", rows, store.mesh),
            Variant(f"sample {rows}", small, functools.partial(spec.sampler.lower, rows), (rows,)),
        )


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


def _specs(params: Any) -> Any:
    """Shapes alone, so that a pending compilation does not keep the weights of a removed task alive."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), params)


def compile_all(programs: Iterable[Variant]) -> None:
    """Compiles programs one after another."""
    for program in programs:
        program.lower().compile()


class BackgroundCompiler:
    """Compiles the remaining programs in a thread. A shape may be used once all its programs are compiled; `wake` then
    wakes the workers. `stop` ends the thread.
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
        """Ends the thread after the program that it is compiling, and waits for it."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        left = Counter(variant.shape for variant in self._rest)
        for variant in self._rest:
            if self._stopping.is_set():
                return
            try:
                variant.lower().compile()
            except Exception:
                # A program that cannot be compiled (out of memory) is not used; workers continue with other shapes.
                logger.exception("%s could not be compiled", variant.name)
                continue
            left[variant.shape] -= 1
            if variant.shape is not None and not left[variant.shape]:
                for ready in self._ready:
                    ready.add(variant.shape)
                self._wake()
        for ready in self._ready:
            ready.settle()
        self._report("all programs are compiled")
