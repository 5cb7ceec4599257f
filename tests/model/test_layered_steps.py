"""Chains of small programs compute what one program computes, bit by bit, and are few."""

import dataclasses

import jax
import numpy as np
import pytest
from whole_steps import whole_prefill, whole_score

import pshare_jax as ps
from pshare_jax.model import layered_steps
from pshare_jax.model.attention.blocked import blocked
from pshare_jax.model.kv.pages import content_shape, empty_pages, scatter_pages
from pshare_jax.model.layered_steps import layered_prefill, layered_scatter, layered_score
from pshare_jax.model.paged_batch import PagedBatch, ScoreBatch
from pshare_jax.server.compile_counter import count_compilations

NUM_PAGES, PAGE = 9, 4


@pytest.fixture(params=["llama", "gemma3"])
def model(request, tiny_folders, monkeypatch) -> ps.Model:
    """A tiny model in parts of two layers."""
    monkeypatch.setattr(layered_steps, "PART_LAYERS", 2)
    return ps.load(tiny_folders[request.param])


def pages_of(model: ps.Model):
    return empty_pages(model.config, NUM_PAGES, PAGE, "float32", model.mesh)


def chunk() -> tuple[np.ndarray, PagedBatch]:
    """Two rows of tokens, the second padded."""
    batch = PagedBatch.empty(2, 4)
    batch.fill(0, [1, 2, 3], 0, 8, 0)
    batch.fill(1, [4, 5, 6], 0, 5, 0)
    return np.arange(16, dtype=np.int32).reshape(2, 8), batch


def assert_equal(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_steps_equal_whole_programs(model):
    tokens, batch = chunk()
    prefill, score = (make(model.architecture, model.mesh, blocked) for make in (layered_prefill, layered_score))
    marker, pages = prefill(model.params, tokens, batch, pages_of(model))
    expected = whole_prefill(model)(model.params, tokens, batch, pages_of(model))
    assert_equal((marker, pages), expected)
    scored = ScoreBatch(batch, tokens, np.array(False))
    assert_equal(
        score(model.params, tokens, scored, pages), whole_score(model)(model.params, tokens, scored, expected[1])
    )
    content = jax.numpy.asarray(np.random.default_rng(0).random(content_shape(model.config, 2, PAGE)), np.float32)
    ids = np.array([7, 3], np.int32)
    scatter = layered_scatter(model.config, model.mesh)
    wanted = scatter_pages(pages_of(model), jax.numpy.asarray(ids), content)
    assert_equal(scatter(pages_of(model), ids, content), wanted)


def deep(base: ps.Model, num_layers: int):
    """The base's architecture with so many of its first layers, and parameters of zeros."""
    period = base.config.layers[: 1 + any(layer.window for layer in base.config.layers)]
    layers = (period * num_layers)[:num_layers]
    architecture = dataclasses.replace(base.architecture, config=dataclasses.replace(base.config, layers=layers))
    params = {path: jax.numpy.zeros(shape.shape, shape.dtype) for path, shape in architecture.shapes.items()}
    return architecture, params


def test_equal_parts_share_a_program_and_the_step_compiles_nothing(tiny_folders, monkeypatch):
    monkeypatch.setattr(layered_steps, "PART_LAYERS", 2)
    base = ps.load(tiny_folders["llama"])
    architecture, params = deep(base, 8)
    pages = empty_pages(architecture.config, NUM_PAGES, PAGE, "float32", base.mesh)
    tokens, batch = chunk()
    step = layered_prefill(architecture, base.mesh, blocked)
    lowered = step.lower(params, tokens, batch, pages)
    assert len(lowered.programs) == 3  # the embedding, two layers (for three parts), the last two layers
    lowered.compile()
    before = count_compilations().count
    step(params, tokens, batch, pages)
    assert count_compilations().count == before


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("make", [layered_prefill, layered_score])
def test_what_is_compiled_does_not_grow_with_depth(tiny_folders, family, make):
    base = ps.load(tiny_folders[family])
    tokens, batch = chunk()
    rows = batch if make is layered_prefill else ScoreBatch(batch, tokens, np.array(False))
    lines = []
    for num_layers in (8, 32):
        architecture, params = deep(base, num_layers)
        pages = empty_pages(architecture.config, NUM_PAGES, PAGE, "float32", base.mesh)
        lowered = make(architecture, base.mesh, blocked).lower(params, tokens, rows, pages)
        lines.append(sum(program.as_text().count("\n") for program in lowered.programs))
    assert lines[1] < 1.1 * lines[0]
