"""Pages of real engines: what arrives in a decode pool, page tables of batches that change, preemption and colliding
digests; answers stay the plain loop's (cases.md A2-06, A2-17, A3-11, A3-17, A6-11, A6-12).
"""

import hashlib
import itertools

import numpy as np
import pytest
from exact_world import PLACEMENTS, TASKS, World, finish, full_len, logprobs
from tiny import VOCAB
from tiny_engine import MIN_GAP, Answer, settle

from pshare_jax.engine.kv import keys as page_keys
from pshare_jax.engine.sequence import State

PAGE = 4


@pytest.fixture(scope="module")
def llama(world_of):
    return world_of("llama")


@pytest.fixture(params=PLACEMENTS)
def engines(request, llama):
    return llama.engines(PLACEMENTS[request.param], rows=4)


# --- page tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations((PAGE - 1, PAGE, PAGE + 1))), ids=str)
def test_every_row_begins_at_its_own_pages(engines, order):
    """A6-11: three rows of one batch, with lengths around a page, in every order."""
    requests = [engines.some(length, ("math",), 12)[0] for length in order]
    engines.check(*requests)
    [worker] = engines.engine.decode_workers
    assert worker.num_tokens > 2 * worker.num_steps


@pytest.mark.parametrize("task", ["math", "tools"])
def test_rows_follow_sequences_that_come_and_go(engines, task):
    """A6-12: the first of four requests ends early, another arrives, then the third ends."""
    lengths, counts = (6, 9, 3, 12), (8, 20, 12, 20)
    requests = [engines.some(length, (task,), count)[0] for length, count in zip(lengths, counts, strict=True)]
    answers = [Answer(engines.engine, request) for request in requests]
    while not answers[0].ended:
        engines.engine.step()
    assert sum(answer.sequence.state is State.DECODING for answer in answers) == 3
    [late] = engines.some(17, (task,), 8)
    finish(engines.engine, [*answers, late_answer := Answer(engines.engine, late)])
    for request, answer in zip((*requests, late), (*answers, late_answer), strict=True):
        assert answer.ids == engines.expected(request).ids


@pytest.mark.parametrize("count", [1, 2])
def test_exactly_max_tokens(engines, count):
    """A3-11: prefill samples nothing."""
    requests = engines.some(2 * PAGE, TASKS, count, logprobs=0)
    for answer in engines.check(*requests):
        assert [len(answer.events), len(answer.ids), len(logprobs(answer))] == [count] * 3
        assert [event.completion_tokens for event in answer.events] == list(range(1, count + 1))
        assert answer.events[-1].finish_reason == "length"


# --- transferred pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_bases_kv_arrives(tmp_path, kv_heads):
    """A3-17: with kv heads 2, page 4, head_dim 32 and 3 layers all sizes differ; with 4 kv heads two are the same."""
    world = World("qwen3", tmp_path, num_key_value_heads=kv_heads, num_hidden_layers=3)
    engines = world.engines(rows=1)
    request = engines.request("math", np.random.default_rng(2).integers(0, VOCAB, 7 * PAGE + 2))
    assert engines.expected(request).smallest_gap >= MIN_GAP
    answer = Answer(engines.engine, request)
    while not answer.ids:
        engines.engine.step()
    held, [worker] = answer.sequence.decode.table, engines.engine.decode_workers
    assert held is not None
    assert held is not None
    content = np.concatenate([np.asarray(worker.pool.store.gather([page]))[:, :, :, :1] for page in held.pages[:7]], 3)
    layers, heads = engines.model.config.num_layers, engines.model.config.num_kv_heads
    assert content.shape == (layers, 2, heads, 7, PAGE, 32)
    dense = np.asarray(engines.oracle("math").prefill([request.prompt[:-1]]).layers)[:, :, 0, :, : 7 * PAGE]
    assert np.abs(content.reshape(dense.shape) - dense).max() < 1e-4
    finish(engines.engine, [answer])
    assert answer.ids == engines.expected(request).ids


# --- preemption and collisions -------------------------------------------------------------------------------------------


def test_preempted_sequences_go_on_as_if_nothing_had_been(engines):
    """A2-17, at a quarter of its size: two requests of 2 pages and 2 tokens, and 2 pages and 3 new tokens, 7 pages."""
    [first] = engines.some(2 * PAGE + 2, ("math",), 2 * PAGE + 3)
    [second] = engines.some(2 * PAGE + 2, ("tools",), 11, 7)
    assert first.prompt != second.prompt
    pool = engines.engine.decode_workers[0].pool
    taken = pool.manager.allocate(pool.num_usable - 7, "nobody")
    answers = [Answer(engines.engine, request) for request in (first, second)]
    while not all(answer.ended for answer in answers):
        engines.engine.step()
    pool.manager.release(taken, "nobody")
    settle(engines.engine)
    assert [answer.ids for answer in answers] == [engines.expected(request).ids for request in (first, second)]
    assert engines.engine.decode_workers[0].num_preempted > 0
    stats = engines.engine.prefill_workers[0].pool.cache_stats
    assert (stats.num_requests, stats.prompt_tokens, stats.cached_tokens) == (2, 2 * (2 * PAGE + 2), 0)
    [again] = engines.check(engines.request("tools", first.prompt))
    assert again.cached_tokens == full_len(len(first.prompt), PAGE)


def test_colliding_digests_are_no_hits(engines, monkeypatch):
    """A2-06: with digests of 8 bits every page collides with others; only pages with equal tokens are hits."""
    monkeypatch.setattr(page_keys, "_digest", lambda data: hashlib.sha256(data).digest()[:1])
    draw = np.random.default_rng(5)
    stems = draw.integers(0, VOCAB, (5, 2 * PAGE)).tolist()
    requests = []
    while len(requests) < 500:
        stem = stems[draw.integers(5)][: PAGE * draw.integers(3)]
        prompt = (*stem, *draw.integers(0, VOCAB, draw.integers(1, 4 * PAGE)).tolist())
        request = engines.request(TASKS[draw.integers(3)], prompt, 2)
        if engines.expected(request).smallest_gap >= MIN_GAP:
            requests.append(request)
    pages = {
        request.prompt[:end]
        for request in requests
        for end in range(PAGE, full_len(len(request.prompt), PAGE) + 1, PAGE)
    }
    assert len(pages) > 2 * 256
    hits = 0
    for start in range(0, len(requests), 20):
        hits += sum(answer.cached_tokens for answer in engines.check(*requests[start : start + 20]))
    assert hits > 0
