"""Pools that are far too small, on real engines: eviction under readers, preemption and its host copies, padding rows.

Every answer must be the oracle's and every page must come back.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from faults import Counters, arrays_of, assert_restored, faulty_engine, pools_of, store_of, world_on
from tiny import VOCAB
from tiny_engine import Answer, Engines

from pshare_jax.engine import decode_worker as decode
from pshare_jax.engine.config import placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Request
from pshare_jax.engine.sequence import State
from pshare_jax.model.paged_batch import DecodeBatch


@pytest.fixture(scope="module")
def split(sources) -> Engines:
    return world_on(sources, placed([[0]], [[1]]), debug=True)


@pytest.fixture(scope="module")
def colocated(sources) -> Engines:
    return world_on(sources, placed([[1]], [[1]]), debug=True)


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(12)


# --- eviction under readers -------------------------------------------------------------------------------------------


def prefixed(world: Engines, draw: np.random.Generator) -> list[list[Request]]:
    """For each of five shared prefixes, requests of all tasks with tails of their own."""
    found = []
    for task in ("chat", "math", "lora", "chat", "math"):
        head = draw.integers(0, VOCAB, 17)
        tails = [world.clear(draw, task, int(draw.integers(1, 8)), 4) for _ in range(6)]
        found.append([world.request(tail.task, [*head, *tail.prompt], 4) for tail in tails])
    return found


def loop_clients(world: Engines, engine: Engine, requests: list[list[Request]], count: int) -> None:
    """Six clients with a tail each visit the prefixes in random order until `count` answers are complete."""
    draw = np.random.default_rng(13)
    live: dict[int, tuple[Answer, list[int]]] = {}
    expected = [[world.expected(request).ids for request in row] for row in requests]
    done = 0
    while done < count:
        for client in set(range(6)) - live.keys():
            row = int(draw.integers(5))
            live[client] = Answer(engine, world.again(requests[row][client])), expected[row][client]
        engine.step()
        for client, (answer, ids) in list(live.items()):
            if answer.ended:
                assert answer.error is None
                assert answer.ids == ids
                del live[client]
                done += 1
    for answer, _ in live.values():
        engine.abort(answer.sequence.request.id)
    assert_restored(engine)
    assert sum(pool.cache_stats.cached_tokens for pool in pools_of(engine)) > 0
    assert Counters.of(engine).evictions > count / 2


@pytest.mark.parametrize("which", ["split", "colocated"])
def test_referenced_pages_are_never_lent_again(request, draw, which):
    world = request.getfixturevalue(which)
    loop_clients(world, faulty_engine(world, prefill_pages=12, decode_pages=12), prefixed(world, draw), 120)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["split", "colocated"])
def test_referenced_pages_are_never_lent_again_500(request, draw, which):
    world = request.getfixturevalue(which)
    loop_clients(world, faulty_engine(world, prefill_pages=12, decode_pages=12), prefixed(world, draw), 500)


def test_overlapping_requests_on_one_device(colocated, draw):
    engine = colocated.new_engine()
    tasks = ("chat", "math", "lora")
    colocated.check(*[colocated.clear(draw, tasks[i % 3], int(draw.integers(1, 60))) for i in range(50)], engine=engine)
    assert engine.num_ended == {State.FINISHED: 50}
    assert_restored(engine)


# --- preemption -------------------------------------------------------------------------------------------------------


def test_preempted_answers_are_not_recomputed(sources, draw, monkeypatch):
    world = world_on(sources, placed([[1]], [[1]]), page_size=16, pages=8, rows=2, debug=True)
    requests = [world.clear(draw, "chat", 34, 35) for _ in range(2)]
    fed = watch_prefill(world.engine)
    world.check(*requests)
    preemptions = Counters.of(world.engine).preemptions
    assert preemptions > 0
    # The base is fed prompt tokens alone: both contexts once, and at most the full pages again for each resume.
    assert set(fed) <= {token for request in requests for token in request.prompt[:-1]}
    assert 66 <= len(fed) <= 66 + 32 * preemptions
    stats = world.engine.admission.prefill_pools[0].cache_stats
    assert (stats.num_requests, stats.prompt_tokens, stats.cached_tokens) == (2, 68, 0)
    assert_restored(world.engine)


def watch_prefill(engine: Engine) -> list[int]:
    """Collects the tokens that prefill steps are fed from now on, without padding."""
    fed: list[int] = []
    store = engine.prefill_workers[0].pool.store
    run, prefill = store.run, engine.prefill_workers[0]._weights.paged.prefill

    def watching(step: Any, params: Any, tokens: np.ndarray, rows: Any) -> Any:
        if step is prefill:
            fed.extend(int(one) for row, count in zip(tokens, rows.query_lens, strict=True) for one in row[:count])
        return run(step, params, tokens, rows)

    store.run = watching
    return fed


@pytest.mark.parametrize("which", ["split", "colocated"])
def test_what_goes_to_the_host_comes_back(request, draw, which, monkeypatch):
    world = request.getfixturevalue(which)
    engine = faulty_engine(world, decode_pages=16, prefill_pages=16)
    moved = {"saved": [], "restored": []}

    def save(sequence: Any) -> Any:
        saved = decode_save(sequence)
        assert sequence.decode.table.pages
        moved["saved"].append((sequence.request.id, sequence.num_tokens, saved.parts))
        return saved

    def restore(sequence: Any) -> None:
        held, saved = sequence.decode.table, sequence.decode.saved
        decode_restore(sequence)
        assert sequence.decode.saved is None
        private = held.pages[len(sequence.keys) : -(-(sequence.num_tokens - 1) // 4)]
        again = np.asarray(held.pool.store.gather(private))[:, :, :, : len(private)]
        assert np.array_equal(again, saved.parts[0][:, :, :, : len(private)], equal_nan=True)
        moved["restored"].append((sequence.request.id, sequence.num_tokens, saved.parts))

    decode_save, decode_restore = decode.save, decode.restore
    monkeypatch.setattr(decode, "save", save)
    monkeypatch.setattr(decode, "restore", restore)
    requests = [world.clear(draw, task, length, 20) for length in (9, 14, 20) for task in ("chat", "math", "lora")]
    world.check(*requests, engine=engine)
    assert len(moved["saved"]) == len(moved["restored"]) == Counters.of(engine).preemptions > 3
    by_name = sorted((name, length) for name, length, _ in moved["saved"])
    assert by_name == sorted((name, length) for name, length, _ in moved["restored"])
    assert_restored(engine)


# --- padding rows -----------------------------------------------------------------------------------------------------


def test_padding_rows_beside_one_real_row_over_a_pool_of_nan(sources, draw, monkeypatch):
    world = world_on(sources, placed([[1]], [[1]]), rows=8, debug=True)
    monkeypatch.setattr(decode, "row_buckets", lambda most: [8])
    engine = faulty_engine(world, prefill_pages=4)
    pool = pools_of(engine)[0]
    inner = store_of(pool).inner
    inner.fill(range(inner.num_pages))
    assert all(bool(jnp.isnan(part).all()) for part in arrays_of(pool))
    shapes = []
    run = inner.run

    def watching(step: Any, params: Any, tokens: Any, rows: Any) -> Any:
        result = run(step, params, tokens, rows)
        decodes = isinstance(tokens, DecodeBatch)
        shapes.append((len(tokens.slots), 1) if decodes else tokens.shape)
        if decodes:
            assert np.isfinite(np.asarray(result[0])[0]).all()
        return result

    inner.run = watching
    for length in (1, 4, 5, 9):
        world.check(world.clear(draw, "math", length, 6), engine=engine)
    assert (8, 1) in shapes
    assert {shape[1] for shape in shapes} == {1, 16}
    assert_restored(engine)
