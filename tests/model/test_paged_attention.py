"""Paged attention equals the plain forward pass for any page table, lengths, chunks and page size, and ignores garbage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILIES, tiny_folder

import pshare_jax as ps
from pshare_jax.mesh import make_mesh
from pshare_jax.model.attention.blocked import blocked
from pshare_jax.model.attention.paged import gathered, paged_attend, positions_of
from pshare_jax.model.kv.pages import device_put_content, empty_pages
from pshare_jax.model.paged_batch import PagedBatch
from pshare_jax.model.paged_steps import page_moves
from pshare_jax.model.sharding import pages_sharding

TOTAL = 70


class Paged:
    """A pool filled with NaN, and three rows with random pages; tokens are fed chunk by chunk."""

    def __init__(self, model, page_size, attention_fn, seed=0, num_tables=TOTAL):
        self.model, self.page_size = model, page_size
        draw = np.random.default_rng(seed)
        per_row = -(-num_tables // page_size)
        pool = empty_pages(model.config, 3 * per_row + 4, page_size, "float32", model.mesh)
        self.pool = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), pool)
        self.table = draw.permutation(np.arange(1, 3 * per_row + 1)).reshape(3, per_row).astype(np.int32)
        self.lengths = np.zeros(3, np.int32)
        self.tokens = draw.integers(0, model.config.vocab_size, (3, TOTAL)).astype(np.int32)

        @jax.jit(donate_argnums=2)
        def step(params, tokens, pool, batch):
            decoder = model.architecture.bind(params)
            hidden, pool = decoder(
                tokens, positions_of(batch, tokens.shape[1]), paged_attend(model.config, batch, attention_fn), pool
            )
            return decoder.logits(hidden), pool

        self.step = step

    def feed(self, counts, width):
        """Feed each row's next `counts[b]` tokens in a batch of `width` columns; returns the logits of real tokens."""
        counts = np.array(counts, np.int32)
        chunk = np.zeros((3, width), np.int32)
        for row, count in enumerate(counts):
            chunk[row, :count] = self.tokens[row, self.lengths[row] : self.lengths[row] + count]
        logits, self.pool = self.step(
            self.model.params, chunk, self.pool, PagedBatch(self.table, self.lengths, counts, np.zeros_like(counts))
        )
        self.lengths = self.lengths + counts
        return [np.asarray(logits)[row, :count] for row, count in enumerate(counts)]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    return ps.load(tiny_folder(request.param, tmp_path_factory.mktemp("paged"), std=0.1))


@pytest.mark.parametrize(("attention_fn", "page_size"), [(gathered, 4), (blocked, 1), (blocked, 16)])
def test_any_split_into_chunks_equals_the_plain_forward(model, attention_fn, page_size, monkeypatch):
    # Several blocks even at these lengths, to test the loop's borders.
    monkeypatch.setattr("pshare_jax.model.attention.blocked.BLOCK_TOKENS", 32)
    paged = Paged(model, page_size, attention_fn)
    expected = np.asarray(model.logits(paged.tokens))
    got = [[] for _ in range(3)]
    for counts, width in (([16, 1, 15], 16), ([16, 0, 16], 16), ([3, 16, 9], 16), ([1, 1, 1], 1), ([16, 16, 16], 16)):
        for row, logits in enumerate(paged.feed(counts, width)):
            got[row].append(logits)
    for row in range(3):
        logits = np.concatenate(got[row])
        np.testing.assert_allclose(logits, expected[row, : len(logits)], atol=1e-4, rtol=0)


def test_independent_tokens_equal_chunks_of_one_token(model):
    """Each token sees the stored keys before it and its own key, and nothing is written."""
    draw = np.random.default_rng(5)
    results = []
    for attention_fn in (gathered, blocked):
        paged = Paged(model, 4, attention_fn)
        for counts in ([16, 16, 16], [16, 4, 1]):
            paged.feed(counts, 16)
        stored, tokens = paged.pool, draw.integers(0, model.config.vocab_size, (3, 8)).astype(np.int32)
        draw = np.random.default_rng(5)
        starts, counts = np.array([20, 12, 9], np.int32), np.array([8, 8, 8], np.int32)

        @jax.jit
        def step(tokens, batch, pool, independent, attention_fn=attention_fn):
            decoder = model.architecture.bind(model.params)
            attend = paged_attend(model.config, batch, attention_fn, independent)
            hidden, pool = decoder(tokens, positions_of(batch, tokens.shape[1]), attend, pool)
            return decoder.logits(hidden), pool

        batch = PagedBatch(paged.table, starts, counts, np.zeros_like(counts))
        logits, after = step(tokens, batch, stored, np.array(True))
        for before, now in zip(jax.tree.leaves(stored), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(before[:, 1:], now[:, 1:])
        for index in range(8):
            batch = PagedBatch(paged.table, starts + index, np.ones(3, np.int32), np.zeros(3, np.int32))
            expected, _ = step(tokens[:, index : index + 1], batch, stored, np.array(False))
            np.testing.assert_allclose(logits[:, index], expected[:, 0], atol=1e-4, rtol=0)
        results.append(np.asarray(logits))
    assert np.isfinite(results).all()


def test_pages_move_between_pools_of_different_tp_degrees(tiny_folders):
    model = ps.load(tiny_folders["llama"])
    meshes = make_mesh([0, 1]), make_mesh([4])
    empty, target = (empty_pages(model.config, 9, 4, "float32", mesh) for mesh in meshes)
    source = jax.tree.map(lambda x: jax.device_put(jax.random.normal(jax.random.key(7), x.shape), x.sharding), empty)
    ids, target_ids = np.array([3, 5, 0, 0], np.int32), np.array([7, 2, 0, 0], np.int32)
    content = device_put_content(page_moves(model.config, meshes[0]).gather(source, ids), model.config, meshes[1])
    moved = page_moves(model.config, meshes[1]).scatter(target, target_ids, content)
    for before, after in zip(source, moved, strict=True):
        for part, moved_part in zip(before, after, strict=True):
            assert moved_part.sharding == pages_sharding(model.config, meshes[1])
            np.testing.assert_array_equal(np.asarray(moved_part)[:, [7, 2]], np.asarray(part)[:, [3, 5]])
            np.testing.assert_array_equal(np.asarray(moved_part)[:, [1, 3, 4, 5, 6, 8]], 0)
