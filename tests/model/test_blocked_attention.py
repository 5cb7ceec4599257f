"""`blocked` equals `gathered` for any rows, and reads exactly the blocks that they see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_world import CASES, ROWS, TABLE_TOKENS, World
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.model.attention import blocked as module
from pshare_jax.model.attention.blocked import LANES, blocked
from pshare_jax.model.attention.paged import gathered, stored_ends
from pshare_jax.model.attention.work_list import plan_of
from pshare_jax.model.paged_batch import SharedPrefixes

BLOCK = 32
LENGTH = st.integers(0, TABLE_TOKENS - 48)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_TOKENS", BLOCK)
    monkeypatch.setattr("pshare_jax.model.paged_batch.MIN_SHARED_TOKENS", 1)


def _each(lists):
    return st.lists(lists, min_size=ROWS, max_size=ROWS)


WORLDS = _each(LENGTH), _each(st.integers(0, 3)), _each(st.integers(0, 30)), st.integers(0, 999)
"""The arguments of a `World` after its case."""


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_form(case):
    tolerance = 2e-5 if CASES[case].dtype == "float32" else 4e-2

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.tuples(*WORLDS), st.booleans())
    def check(arguments, independent):
        world = World(CASES[case], *arguments)
        expected = world.run(gathered, independent)
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(world.run(blocked, independent), expected, atol=tolerance, rtol=0)

    check()


def _seen_blocks(world):
    """For each row, the blocks with a key that one of its new tokens sees."""
    block = BLOCK // world.page * world.page
    for length in world.batch.context_lens:
        first = 0 if world.window is None else max(0, length - world.window + 1)
        yield {key // block for key in range(first, length)}


def _items(work):
    """All items, in trips of `LANES`; whatever the number of items of a trip, these are the same."""
    found = []
    for trip in range(-(-int(work.num_items) // LANES)):
        rows, blocks, real = (np.asarray(part) for part in work.items(jnp.asarray(trip), LANES))
        found += [(int(row), int(block)) for row, block in zip(rows[real], blocks[real], strict=True)]
    assert len(found) == int(work.num_items)
    return found


def _plan(world, batch):
    block = BLOCK // world.page * world.page
    ends = stored_ends(batch, None)
    return plan_of(batch, ends, world.T, block, world.page, world.window, with_whole=world.T > 1)


@pytest.mark.parametrize("case", ["gqa", "window", "mqa", "chunk", "window chunk"])
def test_the_plan_is_each_rows_own_blocks_and_shared_blocks_once(case):
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(st.tuples(*WORLDS))
    def check(arguments):
        world = World(CASES[case], *arguments)
        seen = {(row, block) for row, blocks in enumerate(_seen_blocks(world)) for block in blocks}
        alone = _plan(world, world.batch._replace(shared=None))
        items = _items(alone.masked) + (_items(alone.whole) if alone.whole else [])
        assert sorted(items) == sorted(seen)
        if alone.whole:
            block_len = BLOCK // world.page * world.page
            for row, block in _items(alone.whole):
                length = world.batch.context_lens[row]
                assert (block + 1) * block_len <= length
                assert world.window is None or block * block_len > length + world.T - 1 - world.window
        if world.batch.shared is None:
            return
        plan, covered = _plan(world, world.batch), []
        for leader, block in _items(plan.shared):
            assert (leader, block) not in covered
            covered.append((leader, block))
        leaders, num_pages = world.batch.shared
        own = set(_items(plan.masked))
        by_group = {(row, block) for row, block in seen if num_pages[row] > 0 and (int(leaders[row]), block) in covered}
        together = {(row, block) for row, block in by_group if (block + 1) * (BLOCK // world.page) <= num_pages[row]}
        assert own == seen - together
        assert {(int(leaders[row]), block) for row, block in together} == set(covered)

    check()


@pytest.mark.parametrize(
    ("lengths", "window", "shared", "blocks"),
    [
        # One long row among short rows and padding.
        ([100, 20, 20, 0, 0], None, 0, [0, 4 + 1 + 1]),
        # Padding does not switch the window off.
        ([100, 100, 0, 0, 0], 20, 0, [0, 2 + 2]),
        # Four rows on one context of two blocks, each with one of its own; the fifth shares nothing.
        ([70, 70, 80, 90, 40], None, 64, [2, 4 + 2]),
    ],
)
def test_loops_read_each_planned_block_once(lengths, window, shared, blocks, monkeypatch):
    """Counted in the loops of `blocked` itself, which run without jit: a shared block a trip, and `LANES` of the rows' own."""
    counted, loop = [], jax.lax.fori_loop

    def counting(start, stop, *rest):
        counted.append(int(stop) - int(start))
        return loop(start, stop, *rest)

    monkeypatch.setattr(module.jax.lax, "fori_loop", counting)
    prefixes = [0] + [shared // 4] * 3 + [0]
    world = World(CASES["gqa"], lengths, [0] * ROWS, prefixes, 1)
    groups = world.batch.shared
    assert groups is not None
    assert sum(groups.num_pages > 0) == (4 if shared else 0)
    (q, k, v), (keys, values) = world.news, world.pages
    blocked(q, k, v, (keys, values), world.batch, window, 0.3, None)
    assert counted == [blocks[0], -(-blocks[1] // LANES)]


def test_nan_of_one_group_or_row_stays_there():
    lengths = [70, 70, 80, 80, 40]
    world = World(CASES["gqa"], lengths, [0, 0, 0, 2, 0], [0, 16, 0, 16, 0], 2)
    groups = world.batch.shared
    assert groups is not None
    assert list(groups.leaders) == [0, 0, 2, 2, 4]
    before, table = world.run(blocked), world.batch.page_table
    world.pages = tuple(part.at[:, table[0, 3]].set(jnp.nan).at[:, table[4, 1]].set(jnp.nan) for part in world.pages)
    after = world.run(blocked)
    assert np.isnan(after[[0, 1, 4]]).all()
    np.testing.assert_array_equal(after[[2, 3]], before[[2, 3]])


def test_a_rows_result_does_not_depend_on_its_neighbours():
    world = World(CASES["window"], [90, 90, 60, 0, 33], [0] * ROWS, [0, 20, 0, 0, 0], 3)
    together = world.run(blocked)
    world.batch = world.batch._replace(shared=SharedPrefixes.none(ROWS))
    alone = world.run(blocked)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)
    world.batch.context_lens[1:] = 0
    np.testing.assert_array_equal(world.run(blocked)[0], alone[0])
