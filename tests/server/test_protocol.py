"""schema.py and to_requests.py: bodies that are accepted, their engine requests, and errors of fields together."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pshare_jax.sampling.params import SamplingParams
from pshare_jax.server.openai.fields import NEUTRAL
from pshare_jax.server.openai.json_body import parse_body
from pshare_jax.server.openai.schema import ApiError, ChatBody, CompletionBody
from pshare_jax.server.openai.to_requests import Limits, Prompt, check_num_choices, make_requests

pytestmark = pytest.mark.host
LIMITS = Limits(max_len=64, vocab_size=100, stop_ids=frozenset({7}), max_choices=256)
HI = [{"role": "user", "content": "hi"}]


def chat(**fields):
    return parse_body(ChatBody, json.dumps({"model": "m", "messages": HI, **fields}).encode())


def completion(**fields):
    return parse_body(CompletionBody, json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def request(body, prompt=(1, 2, 3)):
    (only,) = make_requests(body, "r", [Prompt(list(prompt))], LIMITS)
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
def test_session_fields(fields, session):
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


def test_tool_calls_may_have_null_content():
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    body = chat(messages=[*HI, {"role": "assistant", "content": None, "tool_calls": calls}])
    assert body.messages[1] == {"role": "assistant", "content": None, "tool_calls": calls}


def test_a_pair_of_surrogate_escapes_is_one_character():
    assert parse_body(CompletionBody, b'{"model": "m", "prompt": "\\ud83d\\ude00"}').prompt == "😀"


def test_too_long_prompts_are_refused_with_their_numbers():
    error = refused(lambda: request(completion(max_tokens=10), [1] * 60))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    # Clients recognise the error by these words.
    assert "maximum context length is 64 tokens" in error["message"]
    assert all(number in error["message"] for number in ("70", "60", "10"))
    for length, extra in ((65, {}), (64, {"max_tokens": 1}), (64, {})):
        error = refused(lambda length=length, extra=extra: request(chat(**extra), [1] * length))
        assert f"{length} tokens" in error["message"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "1000000003" in refused(lambda: request(chat(max_tokens=10**9)))["message"]
    assert request(completion(max_tokens=4), [1] * 60).max_tokens == 4


def test_empty_prompts_and_ids_outside_the_vocabulary_are_refused():
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
    chats = chat(), chat(logprobs=True), chat(logprobs=True, top_logprobs=2)
    assert [request(body).logprobs for body in chats] == [None, 0, 2]


def test_n_choices_for_each_prompt():
    made = make_requests(completion(n=2, seed=9), "r", [Prompt([1, 2]), Prompt([3])], LIMITS)
    assert [(r.id, r.prompt, r.sampling.choice, r.sampling.seed) for r in made] == [
        ("r-0", (1, 2), 0, 9),
        ("r-1", (1, 2), 1, 9),
        ("r-2", (3,), 0, 9),
        ("r-3", (3,), 1, 9),
    ]


def test_values_beyond_the_limits_are_refused_by_field():
    few = Limits(max_len=64, vocab_size=100, stop_ids=frozenset(), max_choices=3)
    assert refused(lambda: check_num_choices(completion(prompt=["a", "b"], n=2), few))["param"] == "n"
    assert refused(lambda: check_num_choices(completion(prompt=[[1]] * 4), few))["param"] == "prompt"
    assert refused(lambda: check_num_choices(chat(n=4), few))["param"] == "n"
    check_num_choices(completion(n=3), few)
    assert refused(lambda: request(completion(logit_bias={"100": 1})))["param"] == "logit_bias"
    many = refused(lambda: request(completion(logit_bias={str(token): 1 for token in range(1025)})))
    assert (many["param"], "1024" in many["message"]) == ("logit_bias", True)
    assert refused(lambda: request(completion(min_tokens=5, max_tokens=4)))["param"] == "min_tokens"
    assert refused(lambda: request(completion(min_tokens=62)))["param"] == "min_tokens"


def test_max_tokens_and_max_completion_tokens_must_agree():
    assert request(chat(max_tokens=3, max_completion_tokens=3)).max_tokens == 3
    body = chat(max_tokens=3, max_completion_tokens=4)
    assert refused(lambda: request(body))["param"] == "max_completion_tokens"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *NEUTRAL})


# The first draw builds tables of all characters, which is too slow for Hypothesis on a busy machine.
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
