"""Answers under grammars from real engines: the plain loop's, whatever else is in the batch, and answers without a grammar
beside them are as if they were alone.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from exact_world import TASKS, preempted
from jsonschema import Draft202012Validator
from random_schemas import Schemas
from tiny import VOCAB
from tiny_engine import COLOCATED, MIN_GAP

from pshare_jax.engine.request import Request
from pshare_jax.errors import PshareError
from pshare_jax.sampling.params import SamplingParams
from pshare_jax.text.grammar import Grammar
from pshare_jax.text.stop_strings import TextOutput

END = frozenset({317, 319})
OBJECT = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["red", "größe", "no"]},
        "size": {"type": "integer", "minimum": -20, "maximum": 300},
        "on": {"type": "boolean"},
    },
    "required": ["kind", "size"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": Grammar.of_schema(OBJECT),
    "regex": Grammar.of_regex("[a-f]{2,}( [é-ü]+)*"),
    "choice": Grammar.of_choice(["first", "second", "日本"]),
    "text": Grammar.of_text('root ::= "(" root ")" | [0-9]+'),
}
KINDS = {
    "greedy": {},
    "hot": {"temperature": 1.5, "seed": 3},
    "cut": {"temperature": 1.5, "seed": 4, "top_k": 6, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 1.1, "seed": 5, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    "repetition": {"repetition_penalty": 1.6},
    "bias": {"logit_bias": ((ord("f"), -np.inf), (ord("1"), 8.0))},
    "choice 2": {"temperature": 1.5, "seed": 3, "choice": 2},
}


@pytest.fixture(scope="module")
def llama(world_of):
    return world_of("llama")


@pytest.fixture(scope="module")
def engines(llama):
    return llama.engines(COLOCATED, rows=4)


def constrained(engines, task, kind="hot", grammar="schema", length=9, max_tokens=54, **fields):
    sampling = SamplingParams(**KINDS[kind])
    [request] = engines.some(
        length, (task,), max_tokens, sampling=sampling, grammar=GRAMMARS[grammar], stop_ids=END, **fields
    )
    return request


def free(engines, task, number):
    sampling = SamplingParams(temperature=number % 2 * 1.2, seed=number)
    [request] = engines.some(5 + number, (task,), 8, number, sampling=sampling, logprobs=number % 3)
    return request


def text_of(engines, answer):
    return engines.tokenizer.decode([token for token in answer.ids if token not in END])


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_plain_loops_in_a_mixed_batch(engines, kind):
    """Of full and LoRA modules and the base, with every kind of grammar, beside answers without one."""
    requests = []
    for number, (name, task) in enumerate(zip(GRAMMARS, [*TASKS, TASKS[1]], strict=True)):
        requests += [constrained(engines, task, kind, name, logprobs=number % 2), free(engines, task, number)]
    answers = engines.check(*requests)
    for request, answer in zip(requests[::2], answers[::2], strict=True):
        assert set(answer.ids[:-1]).isdisjoint(END), request


@pytest.mark.parametrize("task", TASKS)
def test_a_free_row_is_bit_for_bit_the_same_beside_a_grammar(engines, task):
    request = dataclasses.replace(free(engines, task, 5), logprobs=3)
    found = []
    for grammars in ((None, None), (GRAMMARS["schema"], None), (GRAMMARS["text"], GRAMMARS["choice"])):
        made = [engines.again(request), *(constrained(engines, task, length=6 + number) for number in range(2))]
        # As many rows in every step, since the model's own sums may depend on that.
        made[1:] = [
            dataclasses.replace(one, grammar=grammar, min_tokens=8, stop_ids=frozenset())
            for one, grammar in zip(made[1:], grammars, strict=True)
        ]
        engines.engine.flush_cache()
        answers = engines.run(*made)
        found.append([(event.token_id, event.logprobs) for event in answers[0].events[:4]])
    assert found[0] == found[1] == found[2]


def test_finished_answers_end_with_stop(engines):
    names = ["schema", "choice"]
    requests = [constrained(engines, task, "hot", name) for task in TASKS for name in names]
    for request, answer in zip(requests, engines.check(*requests), strict=True):
        assert answer.events[-1].finish_reason == "stop"
        text = text_of(engines, answer)
        assert "".join(event.text for event in answer.events) == text
        if request.grammar == GRAMMARS["choice"]:
            assert text in ("first", "second", "日本")
        else:
            Draft202012Validator(OBJECT).validate(json.loads(text))
        # Nothing may follow, so that no end token is waited for.
        assert answer.ids[-1] not in END


def test_choices_of_one_request_follow_the_grammar_apart(engines):
    first = constrained(engines, "math", "hot", "text")
    requests = [
        dataclasses.replace(first, id=f"choice {n}", sampling=dataclasses.replace(first.sampling, choice=n))
        for n in range(4)
    ]
    answers = engines.check(*requests)
    assert len({tuple(answer.ids) for answer in answers}) > 1


def test_ignore_eos(engines):
    request = dataclasses.replace(constrained(engines, "tools", "hot", "choice"), id="ignores", stop_ids=frozenset())
    [answer] = engines.check(request)
    assert answer.events[-1].finish_reason == "stop"
    assert text_of(engines, answer) in ("first", "second", "日本")


@pytest.mark.parametrize("name", ["regex", "choice"])
def test_min_tokens(engines, name):
    """Where the grammar leaves only the end, it wins."""
    for task in TASKS:
        request = constrained(engines, task, "hot", name, max_tokens=12, min_tokens=9)
        [answer] = engines.check(request)
        assert (len(answer.ids) >= 9) == (name == "regex")


def test_stop_strings(engines):
    request = constrained(engines, "chat", "hot", "schema")
    whole = text_of(engines, engines.check(request)[0])
    for stop in ('"s', "size", whole[-1], whole[0]):
        [answer] = engines.run(dataclasses.replace(request, id=f"stop {stop}", stop=(stop,)))
        assert "".join(event.text for event in answer.events) == whole[: whole.index(stop)]
        assert answer.events[-1].finish_reason == "stop"


def test_an_answer_that_is_cut_is_cut_between_tokens_of_the_plain_loop(engines):
    for count in (1, 2, 7):
        request = constrained(engines, "math", max_tokens=count)
        [answer] = engines.check(request)
        assert answer.events[-1].finish_reason == "length"


def test_a_begun_answer(engines):
    begun = engines.tokenizer.encode('{"kind": "r', add_special_tokens=False)
    fields = {"sampling": SamplingParams(**KINDS["hot"]), "grammar": GRAMMARS["schema"], "stop_ids": END}
    for task in TASKS:
        made = (engines.request(task, [20, 21, n, *begun], 54, response_start=3, **fields) for n in range(40, 70))
        request = next(one for one in made if engines.expected(one).smallest_gap >= MIN_GAP)
        [answer] = engines.check(request)
        assert json.loads('{"kind": "r' + text_of(engines, answer))["kind"] == "red"


def test_a_preempted_answer_goes_on_in_its_grammar(engines):
    first = constrained(engines, "tools", "hot", "regex", max_tokens=20, min_tokens=20)
    second = constrained(engines, "math", "cut", "regex", max_tokens=20, min_tokens=20)
    answers = preempted(engines, first, second)
    assert [answer.ids for answer in answers] == [engines.expected(request).ids for request in (first, second)]


def test_a_failed_grammar_ends_its_row_alone(engines):
    """A bias bans all that the grammar allows: the others of the batch are the plain loop's."""
    banned = SamplingParams(logit_bias=tuple((token, -np.inf) for token in range(VOCAB)))
    bad = engines.request("chat", [1, 2, 3], 8, grammar=GRAMMARS["choice"], sampling=banned)
    stuck = engines.request("chat", [1, 2, 4], 8, grammar=Grammar.of_choice(["ab"]), stop_ids=frozenset({ord("b")}))
    others = [free(engines, "chat", 3), constrained(engines, "chat")]
    answers = engines.run(bad, others[0], stuck, others[1])
    for answer, words in ((answers[0], "logit_bias"), (answers[2], "stop token")):
        assert words in answer.error
        assert answer.events[-1].retry is False
    for request, answer in zip(others, answers[1::2], strict=True):
        assert answer.ids == engines.expected(request).ids


def test_generate_offline(engines, llama):
    engine = engines.engine
    prompts = [llama.prompt(6), llama.prompt(7)]
    sampling = SamplingParams(temperature=1.5, seed=1)
    results = engine.generate(prompts, "tools", sampling, max_tokens=60, grammar=GRAMMARS["schema"])
    for result in results:
        Draft202012Validator(OBJECT).validate(json.loads(result.text))
        assert result.finish_reason == "stop"
    with pytest.raises(PshareError, match="look-around"):
        engine.generate(prompts, "tools", max_tokens=60, grammar=Grammar.of_regex("(?=a)b"))
    assert engine.idle


# --- random schemas --------------------------------------------------------------------------------------------------------


def check_random_schemas(engines, seeds):
    """Answers at temperature 1.5 of a real engine, several at a time: those that finish validate."""
    closers = tuple((token, 6.0) for token in b'"}]')
    sampling = SamplingParams(temperature=1.5, logit_bias=closers)
    requests: list[tuple[Request, Any]] = []
    for seed in seeds:
        schema = Schemas(seed).document()
        try:
            grammar = Grammar.of_schema(schema)
            engines.engine.facts.grammars.check(grammar)
        except PshareError:
            continue
        prompt = np.random.default_rng(seed).integers(0, VOCAB, 5)
        fields = {"sampling": dataclasses.replace(sampling, seed=seed), "grammar": grammar}
        stops = END if seed % 2 else frozenset()
        request = engines.request(TASKS[seed % 3], prompt, 80, stop_ids=stops, **fields)
        requests.append((request, schema))
    num_finished = 0
    free_ones = [free(engines, task, 3) for task in TASKS]
    answers = engines.run(*free_ones, *(request for request, _ in requests), steps=200_000)
    for request, answer in zip(free_ones, answers, strict=False):
        assert answer.ids == engines.expected(request).ids
    for (_, schema), answer in zip(requests, answers[3:], strict=True):
        assert answer.error is None
        detokenizer = TextOutput(engines.tokenizer.detokenizer(), ())
        shown = "".join(map(detokenizer.push, [token for token in answer.ids if token not in END]))
        assert "\ufffd" not in shown + detokenizer.finish() or answer.events[-1].finish_reason == "length"
        if answer.events[-1].finish_reason == "stop":
            num_finished += 1
            validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
            validator.validate(json.loads(text_of(engines, answer)))
    assert num_finished > len(requests) / 2
    return num_finished


def test_answers_of_an_engine_under_random_schemas_validate(engines):
    check_random_schemas(engines, range(12))


@pytest.mark.slow
def test_answers_of_an_engine_under_500_random_schemas_validate(llama):
    engines = llama.engines(COLOCATED, rows=8)
    # An engine takes 256 requests at a time.
    assert sum(check_random_schemas(engines, range(first, first + 100)) for first in range(2000, 2600, 100)) > 250
