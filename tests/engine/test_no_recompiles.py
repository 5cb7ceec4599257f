"""A warmed-up engine compiles nothing for any request; its programs are few, and it uses each as soon as it is compiled."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from faults import Counters, assert_restored, pools_of, shardings, world_on
from tiny import VOCAB
from tiny_engine import Answer, Engines, settle

import pshare_jax as ps
from pshare_jax.engine.config import EngineConfig, KVConfig, placed
from pshare_jax.engine.engine import Engine
from pshare_jax.engine.request import Request
from pshare_jax.engine.scoring import SCORE_TOKENS
from pshare_jax.engine.sequence import State
from pshare_jax.engine.shapes import prefill_shapes, row_buckets
from pshare_jax.engine.warmup import BackgroundCompiler, variants
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.layers import LoraConfig
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.server.compile_counter import count_compilations
from pshare_jax.text.grammar import Grammar

# Devices that no other test uses: what is compiled for them was compiled here.
SPLIT, SPLIT_TP2 = placed([[4]], [[5]]), placed([[4]], [[6, 7]])
TASKS = ("chat", "math", "lora")
GRAMMARS = (Grammar.of_schema({"type": "array"}), Grammar.of_regex("[a-f]+"))


def random_request(world: Engines, draw: np.random.Generator, most: int) -> Request:
    """A request with a random length, sampling and report."""
    answer_len = int(draw.integers(1, 20))
    length = int(draw.integers(1, most - answer_len + 1))
    fields: dict[str, Any] = {"seed": int(draw.integers(1000))}
    if draw.random() < 0.5:
        fields |= {"temperature": 0.8, "top_p": float(draw.choice([1, 0.9])), "top_k": int(draw.choice([0, 5]))}
    if draw.random() < 0.3:
        fields |= {"presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": ((3, -1.0),)}
    scores = length > 1 and draw.random() < 0.3
    start = int(draw.integers(1, length)) if scores and draw.random() < 0.5 else None
    return world.request(
        str(draw.choice(TASKS)),
        draw.integers(0, VOCAB, length),
        answer_len,
        sampling=SamplingParams(**fields),
        logprobs=int(draw.integers(0, 21)) if scores or draw.random() < 0.3 else None,
        scores_prompt=scores,
        response_start=start,
        # A random beginning matches no grammar.
        grammar=GRAMMARS[draw.integers(2)] if start is None and draw.random() < 0.4 else None,
        stop_ids=frozenset(range(10)) if draw.random() < 0.3 else frozenset(),
        min_tokens=int(draw.integers(0, 2)),
        session=str(draw.integers(4)),
    )


def play(world: Engines, engine: Engine, draw: np.random.Generator, count: int) -> None:
    """Runs `count` requests, some of them aborted, one to twelve at a time."""
    live: list[Answer] = []
    wanted = 1
    while count or live:
        if draw.random() < 0.05:
            wanted = int(draw.integers(1, 13))
        while count and len(live) < wanted:
            live.append(Answer(engine, random_request(world, draw, engine.facts.max_len)))
            count -= 1
        engine.step()
        if live and draw.random() < 0.01:
            engine.abort(live[draw.integers(len(live))].sequence.request.id)
        live = [answer for answer in live if not answer.ended]


def preempt(world: Engines, engine: Engine) -> None:
    """Runs two answers in a decode pool that has no page for either to grow into."""
    settle(engine)
    answers = [Answer(engine, world.request("chat", np.full(9, start), 37)) for start in (7, 8)]
    while not all(answer.ids for answer in answers):
        engine.step()
    pool = engine.decode_specs[0].pool
    taken = pool.manager.allocate(pool.manager.num_available, "nobody") or []
    before = Counters.of(engine).preemptions
    while Counters.of(engine).preemptions == before:
        engine.step()
    pool.manager.release(taken, "nobody")
    while not all(answer.ended for answer in answers):
        engine.step()


def check_warm(world: Engines, count: int) -> None:
    """After its variants are compiled, an engine compiles nothing and its pools keep their shardings."""
    engine = world.new_engine()
    for variant in variants(engine):
        variant.lower().compile()
    before, given = count_compilations().count, shardings(engine)
    for num_pages in range(1, 41):
        world.run(world.request("chat", np.full(4 * num_pages, num_pages), 1), engine=engine)
    assert count_compilations().count == before
    play(world, engine, np.random.default_rng(8), count)
    # What `play` does to the pool depends on the device's speed; this does not.
    preempt(world, engine)
    assert count_compilations().count == before
    assert shardings(engine) == given
    assert State.FAILED not in engine.num_ended
    colocated = engine.prefill_specs[0].pool is engine.decode_specs[0].pool
    assert (Counters.of(engine).transfers > 100) is not colocated
    assert_restored(engine)


@pytest.mark.parametrize(("placement", "rows"), [(SPLIT, 4), (SPLIT_TP2, 2)], ids=["tp1", "tp2"])
def test_a_warm_engine_compiles_nothing(sources, placement, rows):
    check_warm(world_on(sources, placement, rows=rows), 120)


@pytest.mark.slow
@pytest.mark.parametrize("placement", [SPLIT, SPLIT_TP2, placed([[6]], [[6]])], ids=["tp1", "tp2", "colocated"])
def test_a_warm_engine_compiles_nothing_in_300_requests(sources, placement):
    check_warm(world_on(sources, placement, chunk=64, rows=8), 300)


def test_the_counter_sees_a_new_program():
    before = count_compilations().count
    jax.jit(lambda x: x * 3)(np.zeros(7))
    assert count_compilations().count == before + 1


def lora_of(base: ps.Model, rank: int) -> ps.DecodeModule:
    """A decode module with an architecture of its own."""
    architecture = base.architecture.with_lora(LoraConfig(rank=rank, scale=1.0, targets=("q", "v")))
    new = {path: np.zeros(x.shape, np.float32) for path, x in architecture.shapes.items() if is_lora(path)}
    return ps.DecodeModule(architecture, {**base.params, **jax.device_put(new)}, base.mesh)


@pytest.mark.parametrize("ranks", [(), (2,), (2, 5)])
def test_the_default_config_has_few_programs(sources, ranks):
    """Adapters add none: they lie stacked, and the base's rows share their steps."""
    base = ps.load(sources[0])
    tasks = {"chat": "base", **{f"lora{rank}": lora_of(base, rank) for rank in ranks}}
    engine = Engine.build(base, EngineConfig(tasks=tasks, placement=placed([[1]], [[0]]), kv=KVConfig(pages=64)))
    assert (engine.chunk_tokens, engine.config.batch.decode_rows, engine.page_size) == (512, 16, 16)
    assert len(variants(engine)) == 37


def test_an_engine_serves_with_the_small_programs_while_the_rest_is_compiled(sources):
    world = world_on(sources, SPLIT, chunk=128)
    engine = world.new_engine()
    programs = variants(engine)
    workers = engine.workers
    for worker in workers:
        worker.compiled.limit(variant.shape for variant in programs if variant.small and variant.shape is not None)
    shapes: list[tuple[int, ...]] = []
    for pool in pools_of(engine):
        pool.run = noted(pool.run, shapes)
    draw = np.random.default_rng(10)
    requests = [world.clear(draw, "chat", length) for length in (3, 40, 130)]
    world.check(*requests, engine=engine)
    assert set(shapes) == {(1, 64), (1, 1)}
    # Nothing is compiled here: each program only counts as compiled.
    lines: list[str] = []
    rest = [dataclasses.replace(variant, lower=Nothing) for variant in programs if not variant.small]
    compiler = BackgroundCompiler(rest, [worker.compiled for worker in workers], lines.append, engine.wake)
    compiler._thread.join()
    assert len(lines) == 1
    for shape in [*prefill_shapes(128), *[(rows,) for rows in row_buckets(4)]]:
        assert all(shape in worker.compiled for worker in workers)


def test_what_is_compiled_has_its_first_run_once_and_hurts_nobody(sources):
    world = world_on(sources, SPLIT, chunk=128)
    engine = world.new_engine()
    workers = engine.workers
    assert engine.warm
    assert not any(worker.warm_up() for worker in workers)
    draw = np.random.default_rng(11)
    requests = [world.clear(draw, "chat", length) for length in (3, 40, 130)]
    world.check(*requests, engine=engine)
    shapes = [variant.shape for variant in variants(engine) if variant.shape is not None]
    for worker in workers:
        worker.compiled.limit(shapes)
    ran: list[tuple[int, ...]] = []
    for worker in workers:
        worker._ran.clear()
        worker.pool.run = noted(worker.pool.run, ran)
    assert not engine.warm
    while any(worker.warm_up() for worker in workers):
        pass
    assert engine.warm
    assert set(ran) == {
        *prefill_shapes(128),
        *((rows, 1) for rows in row_buckets(4)),
        (1, SCORE_TOKENS),
        (4, SCORE_TOKENS // 4),
    }
    assert len(ran) == sum(variant.name.startswith(("prefill", "decode", "score")) for variant in variants(engine))
    # The same prompts still hit the cache, which the first runs did not touch.
    world.check(*requests, engine=engine)


class Nothing:
    """A program that takes no time to compile."""

    def compile(self) -> None:
        pass


def noted(run: Any, ran: list[tuple[int, ...]]) -> Any:
    def running(step: Any, params: Any, tokens: Any, rows: Any) -> Any:
        ran.append((len(tokens.slots), 1) if isinstance(tokens, DecodeBatch) else tokens.shape)
        return run(step, params, tokens, rows)

    return running
