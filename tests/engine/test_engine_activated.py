"""Activated LoRA in the engine, with fake workers: which weights read which tokens, on which KV, whatever fails or changes."""

from typing import Any

import pytest
from fake_engine import Client, Fakes, make_engine
from serving_fakes import Echo, FakeDecode

from pshare_jax.engine.sequence import State
from pshare_jax.share.boundary import Boundary

pytestmark = pytest.mark.host

INVOCATION = (240, 241)
HEAD, TAIL = tuple(range(30)), (50, 51, 52)
INVOKED, PLAIN = (*HEAD, *INVOCATION, *TAIL), (*HEAD, *TAIL)
MODULE, BASE = Echo("t"), Echo("base")


def activated(fakes: Fakes, answer: Echo = MODULE, base: FakeDecode | None = None) -> FakeDecode:
    module = FakeDecode(answer, fakes.faults)
    module.boundary, module.base = Boundary(INVOCATION), base or fakes.decode["b"]
    return module


def engine_of(**settings: Any) -> tuple[Fakes, Client, FakeDecode]:
    """An engine with the base as the task b, and an activated LoRA as t."""
    fakes = make_engine({"b": BASE}, pages=128, **settings)
    module = activated(fakes)
    fakes.engine.put_task("t", dict.fromkeys(range(len(fakes.engine.decode_workers)), module))
    return fakes, Client(fakes), module


def answer_of(prompt: tuple[int, ...], count: int) -> list[int]:
    """What the module says from its invocation on, and the base without it."""
    if prompt == PLAIN:
        return BASE.answer(prompt, count)
    context, first = list(prompt), len(prompt) - len(HEAD)
    for made in range(first, first + count):
        # The fakes count the tokens that the module has consumed itself.
        context.append(MODULE.next_id(context, made - 1))
    return context[len(prompt) :]


@pytest.mark.parametrize("colocated", [False, True])
def test_the_module_reads_from_its_invocation_on(colocated):
    fakes, client, module = engine_of(colocated=colocated)
    name = client.ask(prompt=INVOKED, task="t", max_tokens=4)
    fakes.run()
    assert client.ids(name) == answer_of(INVOKED, 4)
    assert sum(worker.num_tokens for worker in fakes.prefill) == len(HEAD)
    assert module.scored == [*INVOCATION, *TAIL[:-1]]
    assert not fakes.decode["b"].inputs


@pytest.mark.parametrize("colocated", [False, True])
def test_without_the_invocation_the_base_answers(colocated):
    """In one step with the base's own task."""
    fakes, client, module = engine_of(colocated=colocated)
    names = [client.ask(prompt=PLAIN, task=task, max_tokens=4) for task in "tb"]
    fakes.run()
    for name in names:
        assert client.ids(name) == BASE.answer(PLAIN, 4)
    assert max(fakes.decode["b"].rows) == 2
    assert not module.inputs
    assert not module.scored


def test_pages_before_the_invocation_are_everybodys():
    fakes, client, _ = engine_of()
    client.ask(prompt=PLAIN, task="b", max_tokens=1)
    fakes.run()
    invoked = client.ask(prompt=INVOKED, task="t", max_tokens=1)
    fakes.run()
    assert client.cached(invoked) == 28
    # What the module wrote behind them is its own.
    other = client.ask(prompt=(*INVOKED, *TAIL), task="b", max_tokens=1)
    again = client.ask(prompt=INVOKED, task="t", max_tokens=1)
    fakes.run()
    assert (client.cached(other), client.cached(again)) == (28, 28)


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("colocated", [False, True])
def test_prompt_scores_are_the_bases_before_the_invocation(colocated, max_tokens):
    fakes, client, module = engine_of(colocated=colocated)
    name = client.ask(prompt=INVOKED, task="t", max_tokens=max_tokens, logprobs=1, scores_prompt=True)
    fakes.run()
    scores = client.events[name][0].prompt_logprobs
    assert scores[0] is None
    for index, score in enumerate(scores[1:], 1):
        made = index - 1 - len(HEAD)
        best = BASE.next_id(INVOKED[:index], 0) if made < 0 else MODULE.next_id(INVOKED[:index], made)
        assert score is not None
        assert score.top == ((best, 0.0),)
    assert fakes.decode["b"].scored == list(HEAD)
    assert module.scored == list(INVOKED[len(HEAD) : -1])
    assert client.ids(name) == answer_of(INVOKED, max_tokens)


def test_an_answer_does_not_move_the_boundary():
    """A begun answer that holds the invocation."""
    fakes, client, module = engine_of()
    prompt = (*INVOKED, *INVOCATION, 9)
    client.ask(prompt=prompt, task="t", max_tokens=2, response_start=len(INVOKED))
    fakes.run()
    assert sum(worker.num_tokens for worker in fakes.prefill) == len(HEAD)
    assert module.scored == list(prompt[len(HEAD) : -1])


@pytest.mark.parametrize("colocated", [False, True])
@pytest.mark.parametrize("scores_prompt", [False, True])
def test_a_step_that_fails_once_changes_no_answer(colocated, scores_prompt, caplog):
    """Whichever it is, of the base's or the module's: lost KV is computed by the weights that it was computed by."""
    fields = {"scores_prompt": True, "logprobs": 0} if scores_prompt else {}
    num_failed = 0
    for number in range(0, 26, 2):
        fakes, client, module = engine_of(colocated=colocated, chunk=8, rows=2)
        calls: list[int] = []

        def fail(calls: list[int] = calls, number: int = number) -> None:
            calls.append(number)
            if len(calls) == number + 1:
                raise RuntimeError("made to fail once")

        fakes.prefill[0].before = fakes.decode["b"].before = module.before = fail
        prompts = (INVOKED, PLAIN)
        names = [client.ask(prompt=prompt, task="t", max_tokens=5, **fields) for prompt in prompts]
        fakes.run()
        for name, prompt in zip(names, prompts, strict=True):
            assert client.ids(name) == answer_of(prompt, 5)
            shown = [event.token_id for event in client.events[name] if event.token_id is not None]
            assert shown == client.ids(name)
        num_failed += len(caplog.records)
        caplog.clear()
    assert num_failed >= 6


def test_preempted_answers_go_on():
    """A pool without room for both."""
    fakes, client, _ = engine_of(decode_pages=22)
    names = [client.ask(prompt=INVOKED, task="t", max_tokens=30, stop_ids=frozenset()) for _ in range(2)]
    fakes.run()
    assert fakes.engine.decode_workers[0].num_preempted
    for name in names:
        assert client.ids(name) == answer_of(INVOKED, 30)


def test_a_task_that_is_replaced_while_a_request_arrives(monkeypatch):
    """The keys of its pages are those of the module that it decodes with."""
    fakes, client, module = engine_of()
    plain = FakeDecode(Echo("u"), fakes.faults)
    make, replaced = fakes.engine._handles, []

    def made(*arguments: Any) -> Any:
        handles = make(*arguments)
        if not replaced:
            replaced.append(True)
            fakes.engine.put_task("t", {0: plain})
        return handles

    monkeypatch.setattr(fakes.engine, "_handles", made)
    name = client.ask(prompt=INVOKED, task="t", max_tokens=3)
    fakes.run()
    assert client.ids(name) == Echo("u").answer(INVOKED, 3)
    assert client.sequences[name].split.base_len == len(INVOKED) - 1
    assert not module.scored


def test_a_running_answer_keeps_its_module_when_the_task_is_replaced():
    fakes, client, _ = engine_of()
    name = client.ask(prompt=INVOKED, task="t", max_tokens=6)
    fakes.step_until(lambda: client.state(name) is State.DECODING)
    fakes.engine.put_task("t", {0: FakeDecode(Echo("u"), fakes.faults)})
    fakes.run()
    assert client.ids(name) == answer_of(INVOKED, 6)
