"""protocol.py: what bodies are accepted, and the field each refusal names."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pshare_jax.sampling.params import SamplingParams
from pshare_jax.server.openai.fields import NEUTRAL
from pshare_jax.server.openai.schema import (
    ApiError,
    ChatBody,
    CompletionBody,
    parse_body,
)
from pshare_jax.server.openai.to_requests import Limits, check_num_answers, make_requests

pytestmark = pytest.mark.host

LIMITS = Limits(max_len=64, vocab_size=100, stop_ids=frozenset({7}))
HI = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return parse_body(ChatBody, json.dumps({"model": "m", "messages": HI, **fields}).encode())


def completion(**fields):
    return parse_body(CompletionBody, json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def request(body, prompt=(1, 2, 3)):
    (only,) = make_requests(body, "r", [list(prompt)], LIMITS)
    return only


def refused(call):
    with pytest.raises(ApiError) as caught:
        call()
    assert caught.value.status == 400
    assert "\n" not in caught.value.error["message"]
    return caught.value.error


def test_null_means_absent_for_every_optional_field():
    names = [name for name, field in ChatBody.model_fields.items() if not field.is_required()]
    assert chat(**dict.fromkeys([*names, *NEUTRAL])) == chat()
    assert completion(**dict.fromkeys(["stream", "max_tokens", "echo", "best_of", "suffix"])) == completion()


def test_defaults():
    made = request(chat())
    assert made.sampling == SamplingParams(temperature=1.0, seed=made.sampling.seed)
    assert (made.max_tokens, made.stop_ids, made.cache_salt, made.session) == (61, {7}, "", None)
    assert made.sampling.seed != request(chat()).sampling.seed


def test_fields_reach_the_request():
    made = request(
        completion(
            temperature=0,
            top_p=0.5,
            top_k=-1,
            min_p=0.1,
            seed=-3,
            stop=["a", None, "b"],
            stop_token_ids=[9],
            ignore_eos=True,
            max_completion_tokens=5,
            cache_salt="tenant ü",
        )
    )
    assert made.sampling == SamplingParams(temperature=0.0, top_p=0.5, top_k=0, min_p=0.1, seed=-3)
    assert (made.stop, made.stop_ids, made.max_tokens) == (("a", "b"), {9}, 5)
    assert made.cache_salt == "tenant ü"


@pytest.mark.parametrize(
    ("fields", "session"),
    [
        ({}, None),
        ({"user": "u"}, "u"),
        ({"prompt_cache_key": "k"}, "k"),
        ({"user": "u", "prompt_cache_key": "k"}, "k"),
        ({"user": "u", "prompt_cache_key": ""}, "u"),
    ],
)
def test_what_names_the_session(fields, session):
    assert request(chat(**fields)).session == session
    assert request(completion(**fields)).session == session


def test_neutral_values_and_unknown_fields_are_accepted():
    chat(
        n=1,
        logprobs=False,
        top_logprobs=0,
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        tool_choice="none",
        response_format={"type": "text"},
        metadata={"a": 1},
        store=True,
        service_tier="auto",
        whatever=[1],
    )
    completion(best_of=1, echo=False, repetition_penalty=1.0, suffix="", session_id="x", cache_salt="s")


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("hi", ["hi"]),
        ([1, 2], [[1, 2]]),
        (["hi"], ["hi"]),
        (["a", ""], ["a", ""]),
        ([[1, 2]], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ("", [""]),
        ([], [[]]),
    ],
)
def test_prompt_forms(prompt, plain):
    assert completion(prompt=prompt).prompts == plain


def test_a_call_turn_may_have_null_content():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    body = chat(messages=[*HI, {"role": "assistant", "content": None, "tool_calls": calls}])
    assert body.messages[1] == {"role": "assistant", "content": None, "tool_calls": calls}


SHARED_FAULTS = [
    ("max_tokens", "5"),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_completion_tokens", "5"),
    ("temperature", "1"),
    ("temperature", True),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("top_p", 1.1),
    ("top_k", 2**31),
    ("top_k", 1.0),
    ("min_p", -1),
    ("seed", "7"),
    ("seed", 2**63),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", []),
    ("stream_options", {"include_usage": "yes"}),
    ("stop", 5),
    ("stop", ["a", 5]),
    ("stop", ""),
    ("stop", list("abcde")),
    ("stop_token_ids", "1"),
    ("stop_token_ids", [True]),
    ("ignore_eos", "no"),
    ("user", 5),
    ("cache_salt", 123),
    ("prompt_cache_key", []),
    ("model", 5),
    ("model", None),
    ("n", "5"),
    ("n", True),
    ("n", 0),
    ("n", 129),
    ("presence_penalty", 2.1),
    ("presence_penalty", "0"),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 1e-60),
    ("repetition_penalty", 101),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", {"5": True}),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"٣": 1}),
    ("min_tokens", -1),
    ("min_tokens", True),
    ("best_of", 3),
    ("response_format", {"type": "json_object"}),
    ("structured_outputs", {}),
]
CHAT_FAULTS = [
    ("messages", None),
    ("messages", "hi"),
    ("messages", []),
    ("messages", ["hi"]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "assistant", "tool_calls": "x"}]),
    ("tools", {"a": 1}),
    ("tools", ["f"]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("chat_template_kwargs", "x"),
    ("functions", [{"name": "f"}]),
    ("logprobs", 1),
    ("top_logprobs", 21),
    ("top_logprobs", 5),
]
COMPLETION_FAULTS = [
    ("prompt", None),
    ("prompt", 5),
    ("prompt", {"a": 1}),
    ("prompt", [1, "a"]),
    ("prompt", [1, True]),
    ("prompt", [1.0]),
    ("prompt", [[1, None]]),
    ("prompt", ["a", [1]]),
    ("prompt", ["a", 5]),
    ("prompt", [[1], ["a"]]),
    ("logprobs", True),
    ("logprobs", 21),
    ("logprobs", -1),
    ("suffix", "x"),
]


@pytest.mark.parametrize(("field", "value"), SHARED_FAULTS + CHAT_FAULTS)
def test_chat_refusals_name_the_field(field, value):
    error = refused(lambda: chat(**{field: value}))
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(("field", "value"), SHARED_FAULTS + COMPLETION_FAULTS)
def test_completion_refusals_name_the_field(field, value):
    error = refused(lambda: completion(**{field: value}))
    assert error["param"] == field
    assert field in error["message"]


DEEP = b"[" * 200 + b"]" * 200
RAW = [
    b"",
    b"{",
    b"hello",
    b"[]",
    b"5",
    b"null",
    b'{"model": "m", "prompt": "x", "temperature": NaN}',
    b'{"model": "m", "prompt": "x", "temperature": Infinity}',
    b'{"model": "m", "prompt": "x", "temperature": 1e999}',
    b'{"model": "m", "prompt": "\xff"}',
    b'{"model": "m", "prompt": "\\ud800"}',
    b'{"model": "\\udc00x", "prompt": "x"}',
    b'{"model": "m", "prompt": "x", "a": {"\\ud800": 1}}',
    b'{"model": "m", "prompt": "x", "a": ' + DEEP + b"}",
    b"[" * 100_000,
    b'{"model": "m", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("raw", RAW)
def test_bodies_that_are_no_request(raw):
    assert refused(lambda: parse_body(CompletionBody, raw))["type"] == "invalid_request_error"


def test_a_pair_of_surrogate_escapes_is_one_character():
    assert parse_body(CompletionBody, b'{"model": "m", "prompt": "\\ud83d\\ude00"}').prompt == "😀"


def test_too_long_tells_the_true_numbers():
    error = refused(lambda: request(completion(max_tokens=10), [1] * 60))
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith(
        "This model's maximum context length is 64 tokens. However, you requested 70 tokens"
    )
    assert "60 in the prompt, 10 in the completion" in error["message"]
    for length, extra in ((65, {}), (64, {"max_tokens": 1}), (64, {})):
        error = refused(lambda length=length, extra=extra: request(chat(**extra), [1] * length))
        assert f"resulted in {length} tokens" in error["message"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "you requested 1000000003 tokens" in refused(lambda: request(chat(max_tokens=10**9)))["message"]
    assert request(completion(max_tokens=4), [1] * 60).max_tokens == 4


def test_prompts_the_model_cannot_take():
    for prompt in ([], [100], [-1]):
        assert refused(lambda prompt=prompt: request(completion(), prompt))["param"] == "prompt"


def test_sampling_fields_reach_the_request():
    made = request(
        completion(
            presence_penalty=1,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            logit_bias={"5": -100, "07": 2.5},
            min_tokens=4,
            logprobs=3,
            seed=1,
        )
    )
    assert made.sampling == SamplingParams(
        temperature=1.0,
        seed=1,
        presence_penalty=1.0,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias=((5, -100.0), (7, 2.5)),
    )
    assert (made.min_tokens, made.logprobs) == (4, 3)
    assert [
        request(chat(**one)).logprobs for one in ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2})
    ] == [
        None,
        0,
        2,
    ]


def test_n_answers_for_each_prompt():
    made = make_requests(completion(n=2, seed=9), "r", [[1, 2], [3]], LIMITS)
    assert [(one.id, one.prompt, one.sampling.choice, one.sampling.seed) for one in made] == [
        ("r-0", (1, 2), 0, 9),
        ("r-1", (1, 2), 1, 9),
        ("r-2", (3,), 0, 9),
        ("r-3", (3,), 1, 9),
    ]


def test_what_does_not_fit_the_server_is_refused_by_field():
    few = Limits(max_len=64, vocab_size=100, stop_ids=frozenset(), max_answers=3)
    assert refused(lambda: check_num_answers(completion(prompt=["a", "b"], n=2), few))["param"] == "n"
    assert refused(lambda: check_num_answers(completion(prompt=[[1]] * 4), few))["param"] == "prompt"
    assert refused(lambda: check_num_answers(chat(n=4), few))["param"] == "n"
    check_num_answers(completion(n=3), few)
    assert refused(lambda: request(completion(logit_bias={"100": 1})))["param"] == "logit_bias"
    assert refused(lambda: request(completion(min_tokens=5, max_tokens=4)))["param"] == "min_tokens"
    assert refused(lambda: request(completion(min_tokens=62)))["param"] == "min_tokens"


def test_two_limits_must_agree():
    assert request(chat(max_tokens=3, max_completion_tokens=3)).max_tokens == 3
    assert refused(
        lambda: chat(max_tokens=3, max_completion_tokens=4) and request(chat(max_tokens=3, max_completion_tokens=4))
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *NEUTRAL})


# Its first draw builds tables of all characters, which a busy machine calls too slow.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), st.sampled_from([chat, completion]))
def test_any_body_is_a_request_or_an_api_error(fields, make):
    try:
        made = request(make(**fields))
    except ApiError as error:
        json.dumps(error.error)
    else:
        assert 1 <= made.max_tokens <= 61
        assert 0 <= made.sampling.temperature <= 2
