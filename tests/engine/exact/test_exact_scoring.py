"""Scores and begun answers of real engines equal the oracle's, for every family, task and placement (invariant 4)."""

import numpy as np
import pytest
from exact_world import LOGPROB_TOLERANCE, TASKS
from tiny import FAMILIES, VOCAB
from tiny_engine import COLOCATED, MIN_GAP, SPLIT, settle

import pshare_jax as ps
from pshare_jax.engine import scoring
from pshare_jax.engine.config import placed

LENGTH, START = 27, 11


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def world(family, world_of):
    return world_of(family)


def expected_scores(engines, request):
    """The oracle's."""
    return ps.score(engines.oracle(request.task), request.task, request.prompt, response_start=request.response_start)


def assert_scored(engines, answer, request):
    scores = answer.events[0].prompt_logprobs
    expected = expected_scores(engines, request)
    assert [score is None for score in scores] == [score is None for score in expected]
    got = [score and score.logprob for score in scores]
    for ours, theirs in zip(got, expected, strict=True):
        assert theirs is None or abs(ours - theirs) < LOGPROB_TOLERANCE
    assert [score.token_id for score in scores if score] == [
        token for token, score in zip(request.prompt, expected, strict=True) if score is not None
    ]
    for score in scores:
        if score is not None:
            logprobs = [value for _, value in score.top]
            assert logprobs == sorted(logprobs, reverse=True)
            assert logprobs[0] >= score.logprob - 1e-6
    for place in (START + 1, LENGTH - 1):
        cut = engines.request(request.task, request.prompt[:place], 1, response_start=request.response_start)
        best = engines.expected(cut)
        if best.smallest_gap >= MIN_GAP:
            assert scores[place].top[0][0] == best.ids[0]
            assert abs(scores[place].top[0][1] - best.logprobs[0]) < LOGPROB_TOLERANCE


def clear(engines, task, number, **fields):
    """A request for scores whose answer has no near-tie."""
    for seed in range(50):
        prompt = np.random.default_rng((number, seed)).integers(0, VOCAB, LENGTH)
        request = engines.request(task, prompt, 4, logprobs=3, scores_prompt=True, **fields)
        if engines.expected(request).smallest_gap >= MIN_GAP:
            return request
    raise AssertionError("every prompt has a near-tie")


PLACED = {"llama": (SPLIT, 4), "qwen3": (placed([[0]], [[2, 3]]), 1), "gemma3": (COLOCATED, 16)}
"""A placement and page size for each family: with pages of 16 base and begun answer share a page."""


def test_scores_and_begun_answers_equal_the_oracle(family, world, monkeypatch):
    # Several steps a prompt, and the last tokens of several prompts in one step.
    monkeypatch.setattr(scoring, "SCORE_TOKENS", 16)
    place, page_size = PLACED[family]
    tasks = TASKS if family == "llama" else ("math",)
    engines = world.engines(place, page_size=page_size)
    for start in (None, START):
        # Prompts that no earlier request had.
        numbers = range(100 if start else 0, 200)
        requests = [
            clear(engines, task, index, response_start=start) for task, index in zip(tasks, numbers, strict=False)
        ]
        # The second time with a warm cache.
        for again in (False, True):
            asked = [engines.again(request) for request in requests] if again else requests
            answers = engines.check(*asked)
            for request, answer in zip(asked, answers, strict=True):
                assert_scored(engines, answer, request)
                base_pages = answer.sequence.split.base_len // page_size * page_size
                assert answer.cached_tokens == (base_pages if again else 0)
    settle(engines.engine)


def test_what_was_made_scores_as_it_was_made(family, world):
    """The begun answer's scores are the sampled tokens' log-probabilities."""
    engines = world.engines(*PLACED[family][:1], page_size=PLACED[family][1])
    [request] = engines.some(LENGTH, tasks=("tools",), logprobs=0)
    [made] = engines.check(request)
    whole = engines.request(
        "tools", (*request.prompt, *made.ids), 1, logprobs=0, scores_prompt=True, response_start=LENGTH
    )
    [scored] = engines.run(whole)
    scores = scored.events[0].prompt_logprobs[LENGTH:]
    got = [event.logprobs.logprob for event in made.events if event.logprobs]
    np.testing.assert_allclose([score.logprob for score in scores if score], got, atol=LOGPROB_TOLERANCE)
