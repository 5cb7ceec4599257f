"""Steps over paged KV as a chain of small programs, each of a few layers: prefill, scoring and the writing of transferred
pages (`paged_steps`).

XLA's time to compile grows with the number of layers, and equal parts of a model share a program here, so what is compiled
does not grow with depth. A scan would need the layers' weights in stacks, of which unrolled decode steps, the faster form,
could not read a layer without a copy. Results are bit-identical to one program's. The calls are dispatched while the device
computes and cost little beside a chunk of tokens; decode steps, which are short, stay whole.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pshare_jax.mesh import replicated
from pshare_jax.model.architecture import Architecture, Params
from pshare_jax.model.attention.paged import PagedAttention, paged_attend, positions_of
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.kv.pages import KVPages, PageContent, pages_out, scatter_pages
from pshare_jax.model.paged_batch import PagedBatch, ScoreBatch
from pshare_jax.model.scores import Scores, scores_of
from pshare_jax.model.sharding import pages_sharding

PART_LAYERS = 6
"""Layers of a program: a multiple of the period of Gemma 3's sliding windows. Each boundary makes a step of 112 tokens up to
0.1 % slower on idle cores, more where other threads compete for them."""

Call = Callable[..., Any]
"""call(program, *arguments): runs a jitted program, or lowers it and returns the shapes of its results."""


class LayeredStep:
    """A step that is called and lowered like a jitted function."""

    def __init__(self, run: Callable[..., Any], mesh: Mesh):
        """`run(call, *arguments)` makes all its device calls through `call`."""
        self._run, self._whole = run, replicated(mesh)

    def __call__(self, *arguments: Any) -> Any:
        """Dispatches the step."""
        return self._run(lambda program, *inputs: program(*inputs), *arguments)

    def lower(self, *arguments: Any) -> "Lowered":
        """The step's programs for arguments of these shapes."""
        lowered: dict[Any, Any] = {}

        def lower(program: Any, *inputs: Any) -> Any:
            # In one step the inputs of a program differ in nothing but the number of layers.
            key = program, jax.tree.structure(inputs)
            if key not in lowered:
                lowered[key] = program.lower(*inputs)
            # What the programs of a step give to each other is replicated.
            return jax.tree.map(
                lambda out: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=self._whole), lowered[key].out_info
            )

        self._run(lower, *arguments)
        return Lowered(list(lowered.values()))


@dataclass(frozen=True)
class Lowered:
    """The lowered programs of a step, each once."""

    programs: list[Any]

    def compile(self) -> "Compiled":
        """Compiles them; calls of the step use what is compiled here."""
        return Compiled([program.compile() for program in self.programs])


@dataclass(frozen=True)
class Compiled:
    """The compiled programs of a step."""

    programs: list[Any]

    def memory_analysis(self) -> Any:
        """That of the program with the largest temporaries; they run one after another."""
        return max((one.memory_analysis() for one in self.programs), key=lambda sizes: sizes.temp_size_in_bytes)


def layered_prefill(architecture: Architecture, mesh: Mesh, attention_fn: PagedAttention) -> LayeredStep:
    """The step `PagedSteps.prefill`."""
    *rest, last = _parts(architecture)
    start, store = _start(last.alone, mesh), _store(last.alone, mesh, attention_fn)
    programs = [(part, _layers(part.alone, mesh, attention_fn)) for part in rest]

    def run(call: Call, params: Any, tokens: Any, batch: PagedBatch, pages: Any) -> Any:
        x, batch = call(start, last.params(params), tokens, batch)
        written = []
        for part, layers in programs:
            x, new = call(layers, part.params(params), x, batch, None, pages[part.span])
            written += new
        marker, new = call(store, last.params(params), x, batch, pages[last.span])
        return marker, (*written, *new)

    return LayeredStep(run, mesh)


def layered_score(architecture: Architecture, mesh: Mesh, attention_fn: PagedAttention) -> LayeredStep:
    """The step `PagedSteps.score`."""
    parts = _parts(architecture)
    ends = parts[-1]
    start, scores = _start(ends.alone, mesh), _scores(ends.alone, mesh)
    programs = [(part, _layers(part.alone, mesh, attention_fn)) for part in parts]

    def run(call: Call, params: Any, tokens: Any, scored: ScoreBatch, pages: Any) -> Any:
        x, scored = call(start, ends.params(params), tokens, scored)
        written = []
        for part, layers in programs:
            x, new = call(layers, part.params(params), x, scored.batch, scored.independent, pages[part.span])
            written += new
        return call(scores, ends.params(params), x, scored.targets), tuple(written)

    return LayeredStep(run, mesh)


def layered_scatter(config: ModelConfig, mesh: Mesh) -> LayeredStep:
    """The move `PageMoves.scatter`."""
    scatter = _scatter(config, mesh)

    def run(call: Call, pages: Any, ids: Any, content: Any) -> Any:
        written = []
        for start in range(0, len(pages), PART_LAYERS):
            part = pages[start : start + PART_LAYERS]
            written += call(scatter, part, ids, content, np.int32(start))
        return tuple(written)

    return LayeredStep(run, mesh)


@functools.cache
def _scatter(config: ModelConfig, mesh: Mesh) -> Any:
    """(pages of some layers, ids, content of all layers, the first layer) -> pages."""

    def scatter(pages: KVPages, ids: Int[Array, "n"], content: PageContent, start: Int[Array, ""]) -> KVPages:
        return scatter_pages(pages, ids, jax.lax.dynamic_slice_in_dim(content, start, len(pages)))

    return jax.jit(scatter, out_shardings=pages_sharding(config, mesh), donate_argnums=0)


@dataclass(frozen=True)
class _Part:
    """Some layers as a decoder of their own; `paths` are its parameters' paths there and in the whole model."""

    alone: Architecture
    paths: tuple[tuple[str, str], ...]
    span: slice

    def params(self, params: Any) -> Any:
        """The parameters of the layers, and those beside all layers that there are (a prefill copy has no head); a program
        does not read those it does not use.
        """
        return {name: params[path] for name, path in self.paths if path in params}


def _parts(architecture: Architecture) -> list[_Part]:
    config, parts = architecture.config, []
    known: dict[Architecture, Architecture] = {}
    for start in range(0, config.num_layers, PART_LAYERS):
        span = slice(start, start + PART_LAYERS)
        alone = replace(architecture, config=replace(config, layers=config.layers[span]))
        # Equal parts are one object, which knows its shapes.
        alone = known.setdefault(alone, alone)
        parts.append(_Part(alone, tuple((name, _moved(name, start)) for name in alone.shapes), span))
    return parts


def _moved(path: str, by: int) -> str:
    """The path of a parameter of layer i as that of layer i + by."""
    first, *rest = path.split(".")
    return ".".join((first, str(int(rest[0]) + by), *rest[1:])) if first == "layers" else path


@functools.cache
def _start(alone: Architecture, mesh: Mesh) -> Any:
    """(params, tokens, metadata) -> (the embedded tokens, the metadata on the device)."""

    def start(params: Params, tokens: Int[Array, "B T"], metadata: Any) -> tuple[Float[Array, "B T D"], Any]:
        return alone.bind(params).embedding(tokens), metadata

    return jax.jit(start, out_shardings=replicated(mesh))


@functools.cache
def _layers(alone: Architecture, mesh: Mesh, attention_fn: PagedAttention) -> Any:
    """(params, x, batch, independent, the layers' pages) -> (x, pages)."""

    def layers(
        params: Params, x: Float[Array, "B T D"], batch: PagedBatch, independent: Array | None, pages: KVPages
    ) -> tuple[Float[Array, "B T D"], KVPages]:
        attend = paged_attend(alone.config, batch, attention_fn, independent)
        decoder = alone.bind(params, batch.adapters)
        return decoder.through_layers(len(decoder.layers), x, positions_of(batch, x.shape[1]), attend, pages)

    return jax.jit(layers, out_shardings=(replicated(mesh), pages_out(alone.config, mesh)), donate_argnums=4)


@functools.cache
def _store(alone: Architecture, mesh: Mesh, attention_fn: PagedAttention) -> Any:
    """(params, x, batch, the last layers' pages) -> (a number that is ready when the step is done, pages)."""

    def store(
        params: Params, x: Float[Array, "B T D"], batch: PagedBatch, pages: KVPages
    ) -> tuple[Int[Array, ""], KVPages]:
        attend = paged_attend(alone.config, batch, attention_fn)
        pages = alone.bind(params, batch.adapters).stored(x, positions_of(batch, x.shape[1]), attend, pages)
        return jnp.sum(batch.query_lens), pages

    return jax.jit(store, out_shardings=(replicated(mesh), pages_out(alone.config, mesh)), donate_argnums=3)


@functools.cache
def _scores(alone: Architecture, mesh: Mesh) -> Any:
    """(params, x, targets) -> scores."""

    def scores(params: Params, x: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Scores:
        decoder = alone.bind(params)
        return scores_of(decoder.logits(decoder.final_norm(x)), targets, mesh)

    return jax.jit(scores, out_shardings=replicated(mesh))
