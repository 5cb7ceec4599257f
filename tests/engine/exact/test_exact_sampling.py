"""Sampled answers of real engines: the same as the plain loop's with the same parameters, whatever else is in the batch,
and with the logprobs of the raw logits (cases.md A1-31, A3-14).
"""

import dataclasses

import numpy as np
import pytest
from exact_world import LOGPROB_TOLERANCE, PLACEMENTS, TASKS, full_len, logprobs, preempted

import pshare_jax as ps
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.share.generate import log_softmax

PAGE = 4
SEEDED = SamplingParams(temperature=1.0, seed=7)
KINDS = {
    "temperature": {"temperature": 1.3},
    "top_k": {"temperature": 1.5, "top_k": 5},
    "top_p": {"temperature": 1.5, "top_p": 0.7},
    "min_p": {"temperature": 1.5, "min_p": 0.05},
    "all cuts": {"temperature": 2.0, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    "choice": {"temperature": 1.3, "choice": 3},
    "large seed": {"temperature": 1.3, "seed": (1 << 63) + 11},
    "presence": {"presence_penalty": 4.5},
    "frequency": {"temperature": 0.7, "frequency_penalty": 1.1},
    "repetition": {"repetition_penalty": 1.7},
    "bias": {"logit_bias": ((11, 7.0), (12, 9.5), (12, 1.25), (13, -np.inf))},
    "all at once": {
        "temperature": 1.2,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.001,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.2,
        "logit_bias": ((42, 3.0),),
    },
}


@pytest.fixture(scope="module")
def llama(world_of):
    return world_of("llama")


@pytest.fixture(params=PLACEMENTS)
def engines(request, llama):
    return llama.engines(PLACEMENTS[request.param], rows=4)


# --- one request alone decides (A1-31) -----------------------------------------------------------------------------------


def sampled(engines, task, length=10, max_tokens=16, sampling=SEEDED, **fields):
    """A request with an answer that differs from the greedy answer."""
    for number in range(20):
        [request] = engines.some(length, (task,), max_tokens, number, sampling=sampling, **fields)
        greedy = engines.request(task, request.prompt, max_tokens)
        if engines.expected(request).ids != engines.expected(greedy).ids:
            return request
    raise AssertionError("every answer equals the greedy answer")


def neighbours(engines, task, count):
    """Requests of the same task, some greedy and some drawn, each with a seed of its own."""
    made = []
    for number in range(count):
        sampling = SamplingParams(temperature=number % 2 * 1.1, seed=100 + number)
        made += engines.some(5 + number, (task,), 8 + number, sampling=sampling)
    return made


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("place", [0, 3, 7])
def test_neighbours_and_slots_change_nothing(engines, task, place):
    request, others = sampled(engines, task), neighbours(engines, task, 7)
    engines.check(*others[:place], request, *others[place:])


def test_a_seed_alone_and_after_a_prefix_hit(engines):
    request = sampled(engines, "math")
    for cached in (0, full_len(len(request.prompt), PAGE)):
        [answer] = engines.check(dataclasses.replace(request, id=f"after {cached}"))
        assert answer.cached_tokens == cached


def test_a_seed_and_a_preemption(engines):
    """The youngest is preempted: the second of two requests that together need more pages than the pool has."""
    first, second = sampled(engines, "tools"), sampled(engines, "math", sampling=dataclasses.replace(SEEDED, seed=8))
    answers = preempted(engines, first, second)
    assert [answer.ids for answer in answers] == [engines.expected(request).ids for request in (first, second)]


# --- every parameter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_do_what_they_do_in_the_plain_loop(engines, kind):
    """For every task at once, beside greedy requests."""
    sampling = SamplingParams(**{"seed": 5, **KINDS[kind]})
    requests = [sampled(engines, task, 7, 12, sampling, logprobs=0) for task in TASKS]
    plain = [engines.some(9, (task,), 12)[0] for task in TASKS]
    engines.check(*(request for pair in zip(requests, plain, strict=True) for request in pair))


def test_all_kinds_in_one_batch(engines):
    drawn = [SamplingParams(**{"seed": 9, **fields}) for fields in KINDS.values()]
    requests = [sampled(engines, "math", 6, 10, sampling, logprobs=index % 3) for index, sampling in enumerate(drawn)]
    engines.check(*requests)


def test_stop_ids_are_banned_until_enough_tokens_are_out(engines):
    for task in TASKS:
        [plain] = engines.some(8, (task,), 12)
        stop = engines.expected(plain).ids[1]
        early = engines.request(task, plain.prompt, 12, stop_ids=frozenset({stop}))
        late = dataclasses.replace(early, id=f"{early.id} late", min_tokens=5)
        answers = engines.check(early, late)
        assert (answers[0].ids[-1], len(answers[0].ids), answers[0].events[-1].finish_reason) == (stop, 2, "stop")
        assert stop not in answers[1].ids[:5]
        assert len(answers[1].ids) >= 5


# --- scores --------------------------------------------------------------------------------------------------------------


def test_the_first_token_is_the_tasks_own(engines):
    """A3-14: base and tasks disagree on it; it is reported once, with the task's own score."""
    requests = engines.some(12, TASKS, 4, logprobs=5)
    assert len({engines.expected(request).ids[0] for request in requests}) == len(TASKS)
    for request, answer in zip(requests, engines.check(*requests), strict=True):
        right = np.array(first_scores(engines.oracle(request.task), request))
        reported = answer.events[0].logprobs
        assert reported is not None
        assert answer.ids[0] == reported.token_id == right.argmax()
        assert abs(reported.logprob - right.max()) < LOGPROB_TOLERANCE
        assert len(answer.events) == 4
        best = np.argsort(-right)[:5]
        assert [token for token, _ in reported.top] == best.tolist()
        assert np.abs(np.array([score for _, score in reported.top]) - right[best]).max() < LOGPROB_TOLERANCE


def first_scores(shared: ps.SharedModel, request):
    """The plain loop's log-softmax after the last prompt token."""
    kv = shared.transfer(shared.prefill([request.prompt[:-1]]))
    logits, _ = shared.decode(request.task, [[request.prompt[-1]]], kv)
    return log_softmax(np.asarray(logits[0, -1], np.float64))


@pytest.mark.parametrize("sampling", [SEEDED, SamplingParams(temperature=2.0, top_k=3, repetition_penalty=2.0, seed=4)])
def test_logprobs_are_of_the_raw_logits(engines, sampling):
    """Not of what was sampled from; some rows of the batch ask for them and others do not."""
    asked = [sampled(engines, task, 10, 8, sampling, logprobs=index) for index, task in enumerate(TASKS)]
    quiet = [dataclasses.replace(request, id=f"{request.id} quiet", logprobs=None) for request in asked]
    answers = engines.check(*asked, *quiet)
    for index, answer in enumerate(answers[:3]):
        wanted = engines.expected(asked[index]).logprobs
        assert np.abs(np.array(logprobs(answer)) - wanted).max() < LOGPROB_TOLERANCE
        assert [len(event.logprobs.top) for event in answer.events if event.logprobs] == [index] * 8
    assert all(event.logprobs is None for answer in answers[3:] for event in answer.events)


def test_isolated_tasks_sample_alike(llama):
    engines = llama.engines(sharing="isolated", rows=4)
    engines.check(*(sampled(engines, task, logprobs=0) for task in TASKS))
