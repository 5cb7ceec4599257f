"""The GPU kernel equals the plain forms in interpret mode, and is lowered for CUDA in all shapes; nothing here runs on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_world import CASES, Case, World

from pshare_jax.mesh import make_mesh
from pshare_jax.model.attention import kernel as module
from pshare_jax.model.attention.blocked import blocked
from pshare_jax.model.attention.kernel import kernel_attention
from pshare_jax.model.attention.paged import gathered
from pshare_jax.model.paged_batch import PagedBatch

SHAPES = CASES | {
    "decode, heads of 64": Case(16, 1, 8, 2, head_dim=64),
    "decode, heads of 128": Case(16, 1, 8, 2, 40, dtype="bfloat16", head_dim=128),
    "decode, heads of 256": Case(16, 1, 4, 2, 64, 50.0, head_dim=256),
    "decode, heads of 80": Case(16, 1, 3, 1, head_dim=80),
    "chunk, heads of 64": Case(16, 40, 4, 2, head_dim=64),
    "chunk, heads of 128": Case(16, 33, 4, 1, 20, dtype="bfloat16", head_dim=128),
    "chunk, heads of 256": Case(8, 17, 2, 2, 50, 30.0, head_dim=256),
    "chunk, heads of 96": Case(16, 7, 3, 1, head_dim=96),
}
LENGTHS = {
    "odd": [101, 0, 1, 17, 63],
    "one long row": [3, 102, 1, 2, 0],
    "whole blocks and pages": [16, 32, 48, 80, 96],
}
MODELS = {
    "Llama 3.1 8B": (32, 8, 128, None, None),
    "Llama 3.2 1B": (32, 8, 64, None, None),
    "Gemma 2 2B": (8, 4, 256, 4096, 50.0),
    "Gemma 3 270M": (4, 1, 256, 512, None),
    "SmolLM2 135M": (9, 3, 64, None, None),
    "Phi 3 mini": (32, 32, 96, 2047, None),
}
"""Query heads, kv heads, head size, window and soft cap."""


def _kernel(tp=1, *, interpret=True):
    """Made anew, because it is traced with the sizes of the test."""
    return kernel_attention.__wrapped__(make_mesh(list(range(tp))), interpret)


def _small(monkeypatch, splits=True):
    """Sizes with which these short rows have several tiles, blocks and splits."""
    monkeypatch.setattr(module, "TILE_SUMS", 1)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    monkeypatch.setattr(module, "SPLIT_TOKENS", 40 if splits else 1000)


def _close(got, expected, dtype):
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_plain_forms(name, monkeypatch):
    _small(monkeypatch)
    case, kernel = SHAPES[name], _kernel()
    for lengths in LENGTHS.values():
        world = World(case, lengths, [0, 0, 0, 1, 1], [0, 2, 0, 9, 9], 4)
        for independent in (False, True) if case.num_new > 1 else (False,):
            got = world.run(kernel, independent)
            _close(got, world.run(gathered, independent), case.dtype)
            # Of the others test_blocked_attention.py knows it.
            if name not in CASES:
                _close(got, world.run(blocked, independent), case.dtype)


@pytest.mark.parametrize("name", ["gqa", "window chunk", "chunk, heads of 64"])
@pytest.mark.parametrize("small", [False, True])
def test_equals_the_plain_form_with_few_programs(name, small, monkeypatch):
    if small:
        _small(monkeypatch, splits=False)
    world = World(SHAPES[name], LENGTHS["odd"], [0] * 5, [0] * 5, 5)
    _close(world.run(_kernel()), world.run(gathered), "float32")


def test_a_nan_stays_in_its_row(monkeypatch):
    _small(monkeypatch)
    world, kernel = World(CASES["gqa"], [70, 50, 80, 0, 40], [0] * 5, [0] * 5, 6), _kernel()
    before, table = world.run(kernel), world.batch.page_table
    world.pages = tuple(part.at[:, table[2, 3]].set(jnp.nan) for part in world.pages)
    after = world.run(kernel)
    assert np.isnan(after[2]).all()
    np.testing.assert_array_equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_pages_before_the_window_are_not_read(monkeypatch):
    """NaN reaches a result even with a weight of 0, so blocks with NaN are not read."""
    _small(monkeypatch)
    world, kernel = World(CASES["window"], [102] * 5, [0] * 5, [0] * 5, 7), _kernel()
    before, table = world.run(kernel), world.batch.page_table
    # Keys from 63 on are seen, which is in the block of keys 48 to 63.
    world.pages = tuple(part.at[:, table[:, :3]].set(jnp.nan) for part in world.pages)
    np.testing.assert_array_equal(world.run(kernel), before)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", ["decode, heads of 64", "chunk"])
def test_heads_are_divided_among_devices(name, tp, monkeypatch):
    """Of two kv heads each device has one; with four devices each has both, and the queries of one."""
    _small(monkeypatch)
    world = World(SHAPES[name], LENGTHS["odd"], [0] * 5, [0] * 5, 8)
    _close(world.run(_kernel(tp)), world.run(gathered), "float32")


# From JAX 0.11 on.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("dtype", "tp"), [("float32", 1), ("bfloat16", 1), ("bfloat16", 2), ("bfloat16", 8)])
@pytest.mark.parametrize("name", MODELS)
def test_is_lowered_for_cuda(name, dtype, tp):
    """Decode steps of one and many rows, prefill and scoring in the shapes that are served: Triton's rules hold."""
    N, K, H, window, softcap = MODELS[name]
    if N % tp or (K % tp and tp % K):
        pytest.skip("this degree does not divide the model")
    kernel, of = _kernel(tp, interpret=False), jax.ShapeDtypeStruct
    # The last pool has more than 4 GiB for each of keys and values.
    for rows, tokens, table, num_pages, independent in (
        (1, 1, 512, 1024, False),
        (64, 1, 64, 1024, False),
        (2, 512, 64, 1024, False),
        (4, 64, 8, 3_000_000, True),
    ):
        q, k = of((rows, tokens, N, H), dtype), of((rows, tokens, K, H), dtype)
        pages = of((K, num_pages, 16, H), dtype)
        numbers = of((rows,), np.int32)
        batch = PagedBatch(of((rows, table), np.int32), numbers, numbers, numbers)
        flag = of((), bool) if independent else None

        def attend(q, k, pages, batch, flag):
            return kernel(q, k, k, (pages, pages), batch, window, 0.1, softcap, flag)

        lowered = jax.jit(attend).trace(q, k, pages, batch, flag).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("xla.gpu.triton") == 1
