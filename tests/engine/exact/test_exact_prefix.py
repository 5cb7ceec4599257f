"""Prefix hits on real engines: every task hits prompt KV, and answers equal the plain loop's; no prompt hits generated KV
(cases.md A2-04, A2-08 to A2-10, A2-13, A2-19, A2-21).
"""

import pytest
from exact_world import PLACEMENTS, SHARINGS, TASKS, edges, finish, full_len, logprobs
from tiny_engine import Answer

PAGE = 4
ORDERS = [("math", "tools", "chat"), ("tools", "math", "tools"), ("chat", "math", "chat")]


@pytest.fixture(scope="module")
def llama(world_of):
    return world_of("llama")


@pytest.fixture(scope="module")
def gemma(world_of):
    return world_of("gemma3")


@pytest.fixture(scope="module", params=PLACEMENTS)
def engines(request, llama):
    """An engine for each placement: a test uses prompts that no other test has, or a cold engine."""
    return llama.engines(PLACEMENTS[request.param], rows=4)


# --- generated KV is private (A2-04) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", edges(PAGE))
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_a_task_goes_on_from_anothers_answer(engines, length, order):
    cold = engines.new_engine()
    first, same, _ = engines.some(length, tasks=order, max_tokens=3 * PAGE)
    [answer] = engines.check(first, engine=cold)
    [again] = engines.check(same, engine=cold)
    assert (answer.cached_tokens, again.cached_tokens) == (0, full_len(length, PAGE))
    # Pages that hold an answer are hits only once the base has computed them itself.
    before = (*first.prompt, *answer.ids)
    for task in order[1:]:
        turn = engines.turn(task, before)
        prompt_len = len(turn.prompt)
        [made] = engines.check(turn, engine=cold)
        assert made.cached_tokens == full_len(length, PAGE)
        [hit] = engines.check(engines.request(order[0], turn.prompt, 1), engine=cold)
        assert hit.cached_tokens == full_len(prompt_len, PAGE)
        before, length = (*turn.prompt, *made.ids), prompt_len


@pytest.mark.parametrize("length", edges(PAGE))
def test_a_task_goes_on_from_an_answer_that_is_still_being_made(engines, length):
    cold = engines.new_engine()
    first, same = engines.some(length, tasks=("math", "tools"), max_tokens=3 * PAGE)
    answers = [Answer(cold, first)]
    # The tail page has filled up with generated tokens, and one more page.
    while len(answers[0].ids) < 2 * PAGE:
        cold.step()
    turn = engines.turn("tools", (*first.prompt, *answers[0].ids))
    answers += [Answer(cold, turn), Answer(cold, same)]
    finish(cold, answers)
    for request, answer in zip((first, turn, same), answers, strict=True):
        assert answer.ids == engines.expected(request).ids
    assert [answer.cached_tokens for answer in answers] == [0, full_len(length, PAGE), full_len(length, PAGE)]


# --- prompt KV is shared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", edges(PAGE))
def test_the_last_prompt_token_is_always_left(engines, length):
    """A2-10: cold once and warm twice; the same tokens with the same scores."""
    cold = engines.new_engine()
    requests = [engines.some(length, logprobs=0, tasks=("math",))[0] for _ in range(3)]
    answers = [engines.check(request, engine=cold)[0] for request in requests]
    cached = full_len(length, PAGE)
    assert [answer.cached_tokens for answer in answers] == [0, cached, cached]
    assert cached <= length - 1
    assert logprobs(answers[1]) == logprobs(answers[2])


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("length", [10 * PAGE + 1, 10 * PAGE + 2])
def test_cached_tokens_are_told(llama, placement, sharing, length):
    """A2-19: another task's prompt counts as cached where KV is shared, and a task's own always."""
    engines = llama.engines(PLACEMENTS[placement], sharing=sharing)
    first, second, again = engines.some(length, tasks=("math", "tools", "math"))
    answers = [engines.check(request)[0] for request in (first, second, again)]
    whole = 10 * PAGE
    assert [answer.cached_tokens for answer in answers] == [0, whole if sharing == "shared" else 0, whole]
    assert all(event.cached_tokens == answer.cached_tokens for answer in answers for event in answer.events)


@pytest.mark.parametrize("task", TASKS)
def test_a_salt_hits_its_own_and_misses_all_others(engines, task):
    """A2-09: hits and misses, within a task and across tasks."""
    cold = engines.new_engine()
    [request] = engines.some(3 * PAGE, tasks=(task,))
    other = TASKS[TASKS.index(task) - 1]
    whole = full_len(3 * PAGE, PAGE)

    def cached(salt, task=task):
        [answer] = engines.check(engines.request(task, request.prompt, cache_salt=salt), engine=cold)
        return answer.cached_tokens

    assert [cached("a"), cached("a"), cached("a", other)] == [0, whole, whole]
    assert [cached("b"), cached(""), cached("a" * 10_000), cached("\ud800")] == [0, 0, 0, 0]
    assert [cached("b"), cached(""), cached("a"), cached("\ud800")] == [whole] * 4


@pytest.mark.parametrize(("left", "right"), [(("1", (23,)), ("12", (3,))), (("", (1, 23)), ("", (12, 3)))])
def test_parts_that_join_to_the_same_text_are_apart(engines, llama, left, right):
    """A2-08: a salt and the first token, and two tokens."""
    cold = engines.new_engine()
    rest = llama.prompt(2 * PAGE, 1)
    for salt, tokens in (left, right):
        request = engines.turn("math", (*tokens, *rest), cache_salt=salt)
        assert engines.check(request, engine=cold)[0].cached_tokens == 0


@pytest.mark.parametrize("chunk", [1, PAGE - 1, PAGE, PAGE + 1])
def test_prefill_goes_on_from_every_cached_page(llama, chunk):
    """A2-21: the last prompt token's scores are right whatever was cached."""
    engines = llama.engines(chunk=chunk, rows=4)
    length = 5 * PAGE + 3
    for num_pages in range(6):
        [whole] = engines.some(length, tasks=("math",), logprobs=0, first=num_pages)
        cold = engines.new_engine()
        engines.check(engines.turn("tools", whole.prompt[: num_pages * PAGE]), engine=cold)
        [answer] = engines.check(whole, engine=cold)
        assert answer.cached_tokens == num_pages * PAGE


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_hits_on_sliding_layers(gemma, placement):
    """A2-13: four times the same, then prompts that share 59, 57, 53 and 12 of its 60 tokens; the window is 8."""
    engines = gemma.engines(PLACEMENTS[placement], rows=4)
    requests = engines.some(60, tasks=("math", "math", "tools", "math"), max_tokens=4, logprobs=0)
    answers = [engines.check(request)[0] for request in requests]
    assert [answer.cached_tokens for answer in answers] == [0, 56, 56, 56]
    rest = gemma.prompt(60, 99)
    for shared, cached in ((59, 56), (57, 56), (53, 52), (12, 12)):
        turn = engines.turn("tools", (*requests[0].prompt[:shared], *rest[shared:-1]), 4, logprobs=0)
        [answer] = engines.check(turn)
        assert answer.cached_tokens == cached, shared
