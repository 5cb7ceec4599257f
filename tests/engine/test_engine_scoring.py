"""Scoring in the engine, with fake workers: on which KV, in which order, under preemption and aborts."""

import random
from typing import Any

import pytest
from fake_engine import Client, make_engine, watch_calls
from serving_fakes import Echo

from pshare_jax.engine import scoring
from pshare_jax.engine.sequence import State

pytestmark = pytest.mark.host

ECHO = Echo("t")
PROMPT = tuple(number * 7 % 250 for number in range(200))
"""More than one step."""


def engine_of(**settings):
    fakes = make_engine({"t": ECHO, "u": Echo("u")}, pages=128, **settings)
    return fakes, Client(fakes)


def scores_of(client, name):
    """The prompt's scores, which only the first event has."""
    events = client.events[name]
    assert not any(event.prompt_logprobs for event in events[1:])
    scores: tuple[Any, ...] = events[0].prompt_logprobs
    return scores


def made_after(prompt, start, count):
    """The right continuation of a begun answer."""
    context = list(prompt)
    for made in range(len(prompt) - start, len(prompt) - start + count):
        context.append(ECHO.next_id(context, made))
    return context[len(prompt) :]


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5, 33, 129, 200])
def test_every_prompt_token_is_scored_as_the_first_of_an_answer(colocated, length):
    fakes, client = engine_of(colocated=colocated)
    prompt = list(PROMPT[:length])
    if length > 3:
        prompt[3] = ECHO.next_id(prompt[:3], 0)
    name = client.ask(prompt=prompt, max_tokens=3, logprobs=1, scores_prompt=True)
    fakes.run()
    scores = scores_of(client, name)
    assert scores[0] is None
    assert [score.token_id for score in scores[1:]] == prompt[1:]
    for index, score in enumerate(scores[1:], 1):
        best = ECHO.next_id(prompt[:index], 0)
        assert score.top == ((best, 0.0),)
        assert score.logprob == (0.0 if prompt[index] == best else -1.0)
    assert client.ids(name) == ECHO.answer(prompt, 3)
    assert fakes.decode["t"].scored == prompt[:-1]


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("scores_prompt", [False, True])
@pytest.mark.parametrize(("length", "start"), [(2, 1), (9, 1), (9, 5), (9, 8), (150, 2), (200, 77)])
def test_a_begun_answer_goes_on_from_the_modules_own_kv(colocated, scores_prompt, length, start):
    fakes, client = engine_of(colocated=colocated)
    prompt = [*PROMPT[:start], *ECHO.answer(PROMPT[:start], length - start)]
    asked = {"logprobs": 0, "scores_prompt": True} if scores_prompt else {}
    name = client.ask(prompt=prompt, max_tokens=4, response_start=start, **asked)
    fakes.run()
    assert client.ids(name) == made_after(prompt, start, 4)
    assert sum(worker.num_tokens for worker in fakes.prefill) == start - 1
    assert fakes.decode["t"].scored == prompt[start - 1 : -1]
    if scores_prompt:
        scores = scores_of(client, name)
        assert scores[:start] == (None,) * start
        assert [score.logprob for score in scores[start:]] == [0.0] * (length - start)


def test_no_tokens_may_be_asked_for():
    fakes, client = engine_of()
    scored = client.ask(prompt=PROMPT[:9], max_tokens=0, logprobs=0, scores_prompt=True)
    nothing = client.ask(prompt=PROMPT[:9], max_tokens=0)
    fakes.run()
    assert len(scores_of(client, scored)) == 9
    for name in (scored, nothing):
        assert (client.end(name), client.ids(name), len(client.events[name])) == ("length", [], 1)


def test_what_a_begun_answer_wrote_is_never_shared():
    """Invariant 3: the same prompt with and without `response_start`, in either order, hits base pages alone."""
    fakes, client = engine_of()
    prompt = PROMPT[:41]
    client.ask(prompt=prompt, max_tokens=1, response_start=10)
    fakes.run()
    whole = client.ask(prompt=prompt, max_tokens=3)
    fakes.run()
    assert client.cached(whole) == 8
    begun = client.ask(prompt=prompt, max_tokens=2, response_start=10)
    fakes.run()
    assert client.cached(begun) == 8
    assert client.ids(whole) == ECHO.answer(prompt, 3)
    assert client.ids(begun) == made_after(prompt, 10, 2)


def test_scoring_takes_turns_with_answers():
    """No answer waits for more than one scoring step, and scoring continues beside running answers."""
    fakes, client = engine_of()
    other = client.ask(prompt=(1, 2), max_tokens=50)
    fakes.step_until(lambda: client.state(other) is State.DECODING)
    scored = client.ask(prompt=PROMPT, max_tokens=1, logprobs=0, scores_prompt=True)
    waited, before = [], len(client.ids(other))
    fakes.step_until(lambda: client.state(scored) is State.DECODING)
    while not client.ended(scored):
        fakes.step()
        waited.append(len(client.ids(other)) - before)
        before = len(client.ids(other))
    assert fakes.decode["t"].scored
    assert all(sum(waited[index : index + 2]) >= 1 for index in range(len(waited) - 1))
    fakes.run()


def test_sequences_with_few_tokens_to_score_share_a_step():
    """As the choices of a multiple-choice question do; other tasks, and prompts scored token by token, do not mix in."""
    fakes, client = engine_of(rows=8)
    calls, fields = watch_calls(fakes.decode_stores[0]), {"max_tokens": 0, "logprobs": 0, "scores_prompt": True}
    prompts = [[*PROMPT[:20], *ECHO.answer([*PROMPT[:20], number], 9)] for number in range(5)]
    names = [client.ask(prompt=prompt, response_start=20, **fields) for prompt in prompts]
    others = [
        client.ask(prompt=PROMPT[:9], **fields),
        client.ask(prompt=prompts[0], response_start=20, task="u", **fields),
    ]
    ready = fakes.engine.decode_workers[0].compiled
    ready.limit([(8,)])
    fakes.step_until(lambda: all(client.state(name) is State.DECODING for name in (*names, *others)))
    ready.add(scoring.SHAPE)
    ready.add(scoring.SHORT)
    fakes.run()
    assert [len(call.rows) for call in calls if call.kind == "score"] == [4, 1, 1, 1]
    assert [len(scores_of(client, name)) for name in (*names, *others)] == [29] * 5 + [9, 29]
    for name, prompt in zip(names, prompts, strict=True):
        best = [ECHO.next_id(prompt[:index], index - 20) for index in range(20, 29)]
        assert [score.logprob for score in scores_of(client, name)[20:]] == [
            0.0 if token == right else -1.0 for token, right in zip(prompt[20:], best, strict=True)
        ]


def test_scoring_waits_for_its_program():
    fakes, client = engine_of()
    ready = fakes.engine.decode_workers[0].compiled
    ready.limit([(rows,) for rows in (1, 2, 4)])
    scored = client.ask(prompt=PROMPT[:9], max_tokens=1, logprobs=0, scores_prompt=True)
    other = client.ask(prompt=PROMPT[:9], max_tokens=3)
    fakes.step(50)
    assert (client.ended(scored), client.ended(other)) == (False, True)
    ready.add(scoring.SHAPE)
    fakes.run()
    assert client.end(scored) == "length"


def test_scoring_that_will_never_be_compiled_is_an_error_at_once():
    fakes, client = engine_of()
    ready = fakes.engine.decode_workers[0].compiled
    ready.limit([(rows,) for rows in (1, 2, 4)])
    ready.settle()
    names = [client.ask(prompt=PROMPT[:9], logprobs=0, scores_prompt=True), client.ask(prompt=PROMPT, response_start=4)]
    other = client.ask(prompt=PROMPT[:9], max_tokens=3)
    fakes.run()
    assert [client.end(name) for name in names] == [scoring.UNAVAILABLE] * 2
    assert client.end(other) == "length"


@pytest.mark.parametrize("seed", range(6))
def test_a_storm_of_scores_answers_and_aborts_in_small_pools(seed, monkeypatch):
    """A sequence preempted in the middle continues where it was: nothing is scored twice or from a lost page."""
    monkeypatch.setattr(scoring, "SCORE_TOKENS", 5)
    draw = random.Random(seed)
    fakes = make_engine({"t": ECHO}, pages=40, decode_pages=26, rows=4, colocated=bool(seed % 2))
    client, wanted, gone = Client(fakes), {}, set()
    for _ in range(40):
        prompt = [1, *draw.choices(range(250), k=draw.randint(1, 40))]
        start = draw.choice([None, draw.randint(1, len(prompt) - 1)])
        scores = draw.random() < 0.5
        asked = {"logprobs": 1, "scores_prompt": True} if scores else {}
        count = draw.randint(0, 40)
        name = client.ask(prompt=prompt, max_tokens=count, response_start=start, **asked)
        wanted[name] = prompt, start, scores, count
        fakes.step(draw.randint(0, 3))
        if draw.random() < 0.2:
            fakes.engine.abort(name)
            gone.add(name)
    fakes.run(20_000)
    assert fakes.engine.decode_workers[0].num_preempted
    for name, (prompt, start, scores, count) in wanted.items():
        if name in gone and client.end(name) == "abort":
            continue
        first = len(prompt) if start is None else start
        assert client.ids(name) == made_after(prompt, first, count)
        if scores:
            scores = scores_of(client, name)
            begun = start or 1
            assert scores[:begun] == (None,) * begun
            for index in range(begun, len(prompt)):
                made = 0 if start is None else index - start
                assert scores[index].top[0][0] == ECHO.next_id(prompt[:index], made)
