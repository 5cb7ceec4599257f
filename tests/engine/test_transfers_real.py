"""Transfers between real pools: late, failing, lost, out of order, aborted in flight, between all degrees of TP.

Every answer must be the oracle's and every page must come back.
"""

import dataclasses
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from faults import (
    NEVER,
    FaultyStore,
    assert_restored,
    decode_pages,
    faulty_engine,
    has_waiters,
    pools_of,
    shardings,
    stall_after,
    step_until,
    store_of,
    world_on,
)
from tiny import tiny_config, tiny_folder
from tiny_engine import MIN_GAP, Answer, Engines

from pshare_jax.engine.config import placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.failures import MAX_ACCUSED
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.kv.keys import page_keys
from pshare_jax.engine.kv.pool import Pool
from pshare_jax.engine.request import FAILED, TIMED_OUT, Request
from pshare_jax.engine.router import Route
from pshare_jax.engine.sequence import State
from pshare_jax.engine.transfer import MAX_IN_FLIGHT
from pshare_jax.mesh import make_mesh
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.sharding import content_sharding, pages_sharding


@pytest.fixture(scope="module")
def world(sources) -> Engines:
    """One prefill and one decode worker, in debug mode."""
    return world_on(sources, placed([[0]], [[1]]), debug=True)


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(11)


def held_back(engine: Engine) -> FaultyStore:
    """The decode pool's store, at which transfers do not arrive until a test lets them."""
    store = store_of(engine.admission.decode_pools[0])
    store.polls = lambda: NEVER
    return store


def let_come(store: FaultyStore) -> None:
    store.polls = lambda: 0
    for late in store.late:
        late.polls = 0


def assert_right(world: Engines, *answers: Answer) -> None:
    """The answers are finished and equal the oracle's."""
    for answer in answers:
        assert answer.error is None, answer.events[-1]
        expected = world.expected(answer.sequence.request)
        assert expected.smallest_gap >= MIN_GAP
        assert answer.ids == expected.ids


def finish(world: Engines, engine: Engine, *answers: Answer) -> None:
    """Steps until all have ended; they must be right, and the pools as before."""
    step_until(engine, lambda: all(answer.ended for answer in answers))
    assert_right(world, *answers)
    assert_restored(engine)


# --- aborts and failures in flight ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "state"), [(28, State.TRANSFERRING), (40, State.PREFILLING)])
def test_an_aborted_copy_is_never_written_into_pages_that_were_lent_again(world, draw, length, state):
    engine = faulty_engine(world, decode_pages=12)
    first, second = (world.clear(draw, "math", length) for _ in range(2))
    store = held_back(engine)
    gone = Answer(engine, first)
    engine.prefill_workers[0].step()
    assert engine.admission.transfers_of(gone.sequence)
    assert gone.sequence.state is state
    pages = set(decode_pages(gone))
    stale = list(store.late)
    engine.abort(first.id)
    store.polls = lambda: 0
    answer = Answer(engine, second)
    step_until(engine, lambda: answer.sequence.decode.table is not None)
    assert pages & set(decode_pages(answer))
    step_until(engine, lambda: len(answer.ids) >= 2)
    for late in stale:
        late.polls = 0
    finish(world, engine, answer)
    assert gone.ids == []


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("when", ["sent", "written"])
def test_a_copy_that_fails_is_made_again_and_the_second_time_ends_its_request_alone(world, draw, when, times):
    engine = faulty_engine(world)
    running, failing, waiting = (world.clear(draw, task, 30, 12) for task in ("chat", "math", "lora"))
    waiting = world.request("lora", failing.prompt)
    stream = Answer(engine, running)
    step_until(engine, lambda: len(stream.ids) > 1)
    store = store_of(engine.admission.decode_pools[0])
    answers = []
    for number in range(times):
        if when == "sent":
            store.place_fault = RuntimeError("no memory")
        else:
            store.polls = lambda: 3
        if not answers:
            answers.append(Answer(engine, failing))
        num_sent = len(store.late)
        if when == "written":
            step_until(engine, lambda num_sent=num_sent: len(store.late) > num_sent)
            store.late[-1].error = RuntimeError("the link is down")
        step_until(engine, lambda number=number: engine.transfers[0].stats.failures > number)
    answers.append(Answer(engine, waiting))
    finish(world, engine, stream, answers[1], *(answers[:1] if times == 1 else []))
    if times == 2:
        assert answers[0].error == FAILED
        assert answers[0].ids == []
    assert engine.transfers[0].stats.failures == times
    world.check(failing, engine=engine)


def test_a_copy_that_never_comes_is_given_up_and_its_pages_come_back(world, draw):
    engine = faulty_engine(world)
    first = world.clear(draw, "math", 30)
    world.check(dataclasses.replace(first, id="warm", prompt=first.prompt[::-1]), engine=engine)
    store = held_back(engine)
    lost = Answer(engine, first)
    engine.step()
    stall_after(engine, 0.2)
    time.sleep(0.12)
    late = Answer(engine, world.request("lora", first.prompt))
    engine.step()
    assert has_waiters(lost.sequence)
    store.polls = lambda: 0
    step_until(engine, lambda: lost.ended and not time.sleep(0.01))
    assert lost.error == TIMED_OUT
    # Requests that waited for that transfer send their own or fail in turn: none may ever wait for it again.
    step_until(engine, lambda: late.ended and not time.sleep(0.01))
    stall_after(engine, 300.0)
    step_until(engine, lambda: engine.idle)
    assert_restored(engine)
    world.check(world.request("chat", first.prompt), engine=engine)


def test_an_inherited_copy_that_never_comes_is_given_up(world, draw):
    engine = faulty_engine(world)
    first = world.clear(draw, "math", 30)
    store = held_back(engine)
    gone, waiting = Answer(engine, first), Answer(engine, world.request("lora", first.prompt))
    engine.step()
    engine.abort(first.id)
    engine.step()
    assert engine.admission.num_adopted == 1
    assert gone.ended
    store.polls = lambda: 0
    stall_after(engine, 0.2)
    newest = waiting
    for _ in range(20):
        # A chain of requests that wait for it, each submitted before its predecessor fails.
        time.sleep(0.05)
        newest = Answer(engine, world.request("lora", first.prompt))
        engine.step()
    stall_after(engine, 300.0)
    finish(world, engine, newest)


@pytest.mark.parametrize("times", [1, 1 + MAX_ACCUSED])
def test_a_failed_prefill_step_frees_all_pages_and_the_last_ends_its_request(world, draw, times):
    engine = faulty_engine(world, prefill_pages=30)
    running, failing, queued = (world.clear(draw, "math", length, 12) for length in (20, 60, 70))
    stream = Answer(engine, running)
    step_until(engine, lambda: len(stream.ids) > 1)
    answers = [Answer(engine, request) for request in (failing, queued)]
    engine.prefill_workers[0].step()
    assert [answer.sequence.state for answer in answers] == [State.PREFILLING, State.WAITING]
    for _ in range(times):
        step_until(engine, lambda: answers[0].sequence.state is State.PREFILLING)
        held = answers[0].sequence.decode.table
        store_of(engine.admission.prefill_pools[0]).fault = RuntimeError("the device failed")
        engine.prefill_workers[0].step()
        assert answers[0].ended == (engine.admission.prefill_pools[0].generation == 1 + MAX_ACCUSED)
        engine.decode_workers[0].step()
        engine.admission.reap_prefill(0)
        assert held is not None
        assert held.pages == []
    finish(world, engine, stream, answers[1], *(answers[:1] if times == 1 else []))
    if times > 1:
        assert answers[0].error == FAILED


def test_an_abort_during_prefill_frees_the_decode_pages_in_the_next_step(world, draw):
    engine = faulty_engine(world)
    request = world.clear(draw, "math", 60)
    answer = Answer(engine, request)
    engine.prefill_workers[0].step()
    engine.abort(request.id)
    engine.prefill_workers[0].step()
    assert answer.sequence.decode.table is None
    assert_restored(engine)


# --- order ------------------------------------------------------------------------------------------------------------


def test_copies_that_finish_in_reversed_order_into_adjacent_pages(world, draw):
    engine = faulty_engine(world)
    store = held_back(engine)
    requests = [(world.clear(draw, "chat", 30, 10), *(world.clear(draw, "chat", 9, 4) for _ in "ab")) for _ in range(3)]
    world.check(*[request for three in requests for request in three], engine=faulty_engine(world))
    expected = [[world.expected(request).ids for request in three] for three in requests]
    adjacent = 0
    for repeat in range(200):
        turn = repeat % len(requests)
        store.polls = lambda: 0
        stream = Answer(engine, world.again(requests[turn][0]))
        step_until(engine, lambda stream=stream: len(stream.ids) == 2)
        store.polls = lambda: NEVER
        first, second = (Answer(engine, world.again(request)) for request in requests[turn][1:])
        step_until(engine, lambda second=second: second.sequence.state is State.TRANSFERRING)
        tables = [set(decode_pages(answer)) for answer in (first, second)]
        adjacent += any(page + 1 in tables[1] or page - 1 in tables[1] for page in tables[0])
        early, late = store.late[-1], store.late[-2]
        early.polls, late.polls = 0, repeat % 3 + 1
        answers = [stream, first, second]
        step_until(engine, lambda answers=answers: all(answer.ended for answer in answers))
        assert [answer.ids for answer in answers] == expected[turn]
        for pool in pools_of(engine):
            pool.manager.flush()
    assert adjacent > 100
    assert_restored(engine)


def test_a_delayed_copy_does_not_slow_running_streams(world, draw):
    engine = faulty_engine(world)
    streams = [Answer(engine, world.clear(draw, "math", length, 20)) for length in (7, 20, 33)]
    step_until(engine, lambda: all(stream.ids for stream in streams))
    store = held_back(engine)
    held = Answer(engine, world.clear(draw, "math", 60))
    for _ in range(12):
        before = [len(stream.ids) for stream in streams]
        engine.step()
        assert [len(stream.ids) for stream in streams] == [count + 1 for count in before]
    assert len(engine.admission.transfers_of(held.sequence)) == 2
    assert held.ids == []
    let_come(store)
    finish(world, engine, held, *streams)


def test_small_pools_and_many_arrivals_end_all(world, draw):
    # The longest needs 8 prefill pages and, at its end, 9 decode pages.
    engine = faulty_engine(world, prefill_pages=32, decode_pages=18)
    distinct = [world.clear(draw, task, int(draw.integers(1, 32)), 4) for task in ("chat", "math", "lora") * 5]
    requests = [distinct[index % 15] for index in range(64)]
    world.check(*[world.again(request) for request in requests], engine=engine)
    # Idle for longer than a request may stand still.
    stall_after(engine, 0.5)
    time.sleep(0.6)
    world.check(world.again(requests[0]), engine=engine)
    assert_restored(engine)


def test_copies_that_wait_for_others_leave_room_for_these(sources, draw):
    world = world_on(sources, placed([[0], [2]], [[1]]), debug=True)
    engine = faulty_engine(world)
    prefix = draw.integers(0, 320, 70)
    first = Answer(engine, world.request("chat", prefix, 4), Route(0, 0))
    engine.prefill_workers[0].step()
    # Two of three chunks are outstanding: the other requests have prefilled, and wait for them in the decode pool.
    others = [
        Answer(engine, world.request("chat", [*prefix[:68], index, 1], 4), Route(1, 0))
        for index in range(MAX_IN_FLIGHT + 4)
    ]
    for _ in range(60):
        engine.prefill_workers[1].step()
        engine.decode_workers[0].step()
    assert all(has_waiters(first.sequence) and not answer.ids for answer in others)
    finish(world, engine, first, *others)


# --- wake-ups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["aborted in prefill", "aborted on the way", "started"])
def test_pages_that_come_back_wake_every_worker(world, draw, what):
    engine = faulty_engine(world)
    store = held_back(engine)
    request = world.clear(draw, "math", 40 if what == "aborted in prefill" else 20)
    Answer(engine, request)
    engine.prefill_workers[0].step()
    if what == "started":
        let_come(store)
    else:
        engine.abort(request.id)
    returned = 0
    for worker in (engine.prefill_workers[0], *[engine.decode_workers[0]] * 3):
        for thread in engine._threads:
            thread.wake.clear()
        before = [pool.manager.num_used for pool in pools_of(engine)]
        worker.step()
        fewer = any(pool.manager.num_used < used for pool, used in zip(pools_of(engine), before, strict=True))
        returned += fewer
        assert not fewer or all(thread.wake.is_set() for thread in engine._threads)
    assert returned
    assert engine.admission.prefill_pools[0].manager.num_used == 0
    engine.abort(request.id)
    assert_restored(engine)


# --- tensor parallelism -----------------------------------------------------------------------------------------------


def store_on(config: ModelConfig, devices: range) -> DevicePages:
    return DevicePages(config, make_mesh(list(devices)), 9, 4, "float32", [2, 6])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_pair_of_degrees_moves_the_same_arrays(draw, kv_heads):
    config = ModelConfig.from_hf(tiny_config("llama", num_key_value_heads=kv_heads, num_hidden_layers=2))
    given, sources, targets = [5, 1, 7], [1, 2, 4], [1, 2, 4]
    sent: list[tuple[np.ndarray, jax.Array]] = []
    for tp in sources:
        source = store_on(config, range(tp))
        shape = source.content_spec(6).shape
        before = [part.sharding for part in jax.tree.leaves(source.pages)]
        content = draw.normal(size=shape).astype(np.float32)
        source.scatter(range(1, 7), source.device_put(content))
        assert [part.sharding for part in jax.tree.leaves(source.pages)] == before
        sent.append((content[:, :, :, [4, 0, 6 - 1]], source.gather([5, 1, 6])))
    for tp in targets:
        target = store_on(config, range(4, 4 + tp))
        for content, taken in sent:
            placed_content = target.device_put(taken)
            assert placed_content.sharding == content_sharding(config, target.mesh)
            target.scatter(given, placed_content)
            for part in jax.tree.leaves(target.pages):
                assert part.sharding == pages_sharding(config, target.mesh)
                parts = tp if kv_heads % tp == 0 else 1
                assert all(shard.data.nbytes * parts == part.nbytes for shard in part.addressable_shards)
            assert np.array_equal(np.asarray(target.gather(given))[:, :, :, :3], content)


def published(pool: Pool) -> dict[bytes, np.ndarray]:
    """Digest -> content of every page that the pool's prefix cache offers."""
    entries = pool.manager._tree
    return {digest: np.asarray(pool.store.gather([entry.id]))[:, :, :, 0] for digest, entry in entries.items()}


def oracle_pages(world: Engines, request: Request) -> np.ndarray:
    """KV of the request's full pages as the plain loop computes it: `[L, 2, K, pages, page, H]`."""
    size = world.config.kv.page_size
    num_pages = (len(request.prompt) - 1) // size
    dense = world.oracle(request.task).prefill([list(request.prompt[:-1])])
    layers = np.array([[np.asarray(part)[0, :, : num_pages * size] for part in layer] for layer in dense.layers])
    return layers.reshape(*layers.shape[:3], num_pages, size, layers.shape[-1])


def check_degrees(base: Path, prefill: int, decode: int) -> None:
    """Ids are the oracle's; the published pages hold the same bits in both pools, and the oracle's numbers."""
    devices = list(range(8))
    world = Engines(base, {"chat": "base"}, placed([devices[:prefill]], [devices[4 : 4 + decode]]), chunk=16, rows=1)
    draw = np.random.default_rng(2)
    request = world.clear(draw, "chat", 30)
    before = shardings(world.engine)
    world.check(request)
    assert shardings(world.engine) == before
    first, second = (published(pool) for pool in pools_of(world.engine))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    keys = page_keys(world.model.fingerprint, "", request.prompt[:29], 4)
    right = oracle_pages(world, request)
    assert len(keys) == right.shape[3] == 7
    for index, key in enumerate(keys):
        np.testing.assert_allclose(second[key.digest], right[:, :, :, index], atol=1e-4)


def test_degrees_may_differ(tiny_folders):
    """From halves to whole copies of the two kv heads."""
    check_degrees(tiny_folders["llama"], 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("prefill", [1, 2, 4])
@pytest.mark.parametrize("decode", [1, 2, 4])
def test_all_degrees_and_kv_heads(tmp_path, kv_heads, prefill, decode):
    check_degrees(tiny_folder("llama", tmp_path / "base", num_key_value_heads=kv_heads), prefill, decode)
