"""The body of /v1/responses: what becomes of it in the chat that answers, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pshare_jax.server.errors import FIELDS
from pshare_jax.server.openai.json_body import parse_body
from pshare_jax.server.openai.schema import ApiError, ChatBody
from pshare_jax.server.openai.to_requests import Limits, Prompt, make_requests
from pshare_jax.server.responses_api.schema import ResponsesBody

pytestmark = pytest.mark.host
LIMITS = Limits(max_len=64, vocab_size=100, stop_ids=frozenset({7}), max_choices=256)
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
HI = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def body(**fields):
    return parse_body(ResponsesBody, json.dumps({"model": "m", "input": "hi", **fields}).encode())


def refused(**fields):
    with pytest.raises(ApiError) as caught:
        body(**fields)
    error = caught.value
    assert error.status == 400
    assert "\n" not in error.error["message"]
    assert error.error["param"] in FIELDS
    return error.error


def part(text, kind="input_text"):
    return {"type": kind, "refusal" if kind == "refusal" else "text": text}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("hi", [HI]),
        ([HI], [HI]),
        ([{"type": "message", "id": "x", "status": "completed", "phase": None, **HI}], [HI]),
        (
            [{"role": "developer", "content": [part("a"), part("b", "text")]}],
            [{"role": "developer", "content": [part("a", "text"), part("b", "text")]}],
        ),
        (
            [
                HI,
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{**part("x", "output_text"), "annotations": [], "logprobs": []}, part("no", "refusal")],
                },
            ],
            [HI, {"role": "assistant", "content": [part("x", "text"), part("no", "text")]}],
        ),
        # An assistant's text and its calls are one message, whatever reasoning is between them.
        (
            [
                HI,
                {"role": "assistant", "content": "ok"},
                {"type": "reasoning", "id": "r", "summary": []},
                CALL,
                {**CALL, "call_id": "c2"},
                {"type": "function_call_output", "call_id": "c2", "output": "two"},
                {"type": "function_call_output", "call_id": "c1", "output": [part("o"), part("ne")]},
                CALL,
            ],
            [
                HI,
                {"role": "assistant", "content": "ok", "tool_calls": [CHAT_CALL, {**CHAT_CALL, "id": "c2"}]},
                {"role": "tool", "tool_call_id": "c2", "content": "two"},
                {"role": "tool", "tool_call_id": "c1", "content": [part("o", "text"), part("ne", "text")]},
                {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
            ],
        ),
    ],
)
def test_items_become_messages(items, messages):
    assert body(input=items).generation.messages == messages
    system = {"role": "system", "content": "be kind"}
    assert body(input=items, instructions="be kind").generation.messages == [system, *messages]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (7, "input must be a string"),
        ([], "input must be a string"),
        (["x"], "input.0 must be an object"),
        ([HI, {"role": "tool", "content": "x"}], "input.1.role"),
        ([{"role": "user"}], "input.0.content must be"),
        ([{"role": "user", "content": [7]}], "input.0.content.0 must be an object"),
        ([{"role": "user", "content": [part("x"), {"type": "input_image", "image_url": "u"}]}], "input.0.content.1"),
        ([{"role": "user", "content": [{"type": "input_text"}]}], "input.0.content.0.text"),
        ([{"type": "item_reference", "id": "msg_1"}], "stores no items"),
        ([{"type": "web_search_call", "id": "x"}], "web_search_call"),
        ([HI, {**CALL, "arguments": {}}], "input.1.arguments"),
        ([HI, {"type": "function_call_output", "call_id": "c1", "output": "x"}], "input.1.call_id"),
        ([CALL, {"type": "function_call_output", "call_id": "c1"}], "input.1.output"),
        ([CALL, {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_file"}]}], "input_file"),
    ],
)
def test_items_that_cannot_be_messages_are_refused(items, words):
    error = refused(input=items)
    assert error["param"] == "input"
    assert words in error["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KINDS = ["message", "function_call", "function_call_output", "reasoning", "item_reference", "x"]
odd_items = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(KINDS) | json_values,
        "role": st.sampled_from(["user", "assistant"]) | json_values,
        "content": st.lists(st.fixed_dictionaries({"type": st.sampled_from(["input_text", "x"]), "text": json_values}))
        | json_values,
        "call_id": json_values,
        "name": json_values,
        "arguments": json_values,
        "output": json_values,
    },
)


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "input": st.lists(odd_items | json_values, max_size=3),
            "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "name": json_values}) | json_values),
            "tool_choice": json_values,
            "text": st.fixed_dictionaries({"format": json_values}) | json_values,
            "include": json_values,
            "metadata": json_values,
            "store": json_values,
            "top_logprobs": json_values,
        },
    )
)
def test_any_body_is_a_chat_or_a_400(fields):
    try:
        made = body(**fields)
    except ApiError:
        refused(**fields)
    else:
        ChatBody.model_validate({**made.generation.model_dump(), "logit_bias": {}})


def test_tools_and_choices_are_those_of_a_chat():
    flat = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA, "strict": True}
    made = body(tools=[flat, {"type": "function", "name": "g"}], tool_choice="none")
    nested = [
        {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True},
        {"name": "g", "strict": False},
    ]
    assert made.generation.tools == [{"type": "function", "function": one} for one in nested]
    assert made.generation.tool_choice == "none"
    assert made.echo["tools"][1] == {
        "type": "function",
        "name": "g",
        "description": None,
        "parameters": None,
        "strict": False,
    }


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"store": True}, "store", "stores no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "all items of the conversation"),
        ({"conversation": "conv_1"}, "conversation", "all items of the conversation"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "all items of the conversation"),
        ({"background": True}, "background", "while the client waits"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions and input"),
        ({"context_management": [{"type": "compaction"}]}, "context_management", "shorten"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tools": [{"type": "function"}]}, "tools", "tools.0.name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": []}]}, "tools", "tools.0.parameters"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "none, auto, required"),
        ({"tool_choice": "any"}, "tool_choice", "none, auto, required"),
        ({"text": {"format": {"type": "xml"}}}, "text", "json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text", "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"n": 2}, "n", "one answer"),
        ({"metadata": {"a": 1}}, "metadata", "string"),
        # Fields of a chat with another name here: what they mean must not be lost.
        ({"messages": [HI]}, "messages", "send input"),
        ({"max_tokens": 3}, "max_tokens", "send max_output_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format", "send text.format"),
        ({"logprobs": True}, "logprobs", "message.output_text.logprobs"),
    ],
)
def test_refused_fields(fields, param, words):
    error = refused(**fields)
    assert error["param"] == param
    assert words in error["message"]


def test_fields_without_effect_are_accepted():
    made = body(
        store=False,
        background=False,
        n=1,
        truncation="auto",
        include=["reasoning.encrypted_content"],
        reasoning={"effort": "low", "summary": "auto"},
        service_tier="flex",
        stream_options={"include_obfuscation": False},
        max_tool_calls=3,
        prompt_cache_retention="24h",
        whatever=1,
    )
    assert made.generation == body().generation
    assert made.echo == body().echo


def test_null_means_absent():
    optional = [name for name, field in ResponsesBody.model_fields.items() if not field.is_required()]
    nulls = dict.fromkeys([*optional, "store", "previous_response_id", "conversation", "temperature", "truncation"])
    assert body(**nulls).generation == body().generation
    assert body(**nulls).echo == body().echo


def test_fields_reach_the_request():
    made = body(
        max_output_tokens=5,
        temperature=0,
        top_p=0.5,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        seed=4,
        top_k=9,
        stop="x",
        cache_salt="s",
        safety_identifier="someone",
        stream=True,
    )
    (request,) = make_requests(made.generation, "r", [Prompt([1, 2])], LIMITS)
    assert (request.max_tokens, request.logprobs, request.stop, request.cache_salt) == (5, 3, ("x",), "s")
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (0, 0.5, 9)
    assert (request.sampling.seed, request.session, made.stream) == (4, "someone", True)
    assert body(user="u", safety_identifier="s").generation.user == "u"
    assert body(top_logprobs=3).generation.num_logprobs is None


def test_errors_of_the_chat_have_this_endpoints_names():
    for words, named in (
        ("messages is wrong.", "input is wrong."),
        ("response_format.json_schema.schema: keyword: not", "text.format.schema: keyword: not"),
        ("response_format is wrong.", "text.format is wrong."),
        ("temperature is wrong.", "temperature is wrong."),
    ):
        param = words.split(" ")[0].split(".")[0]
        error = body().renamed(ApiError(400, words, param=param, code="c", retry=False))
        own = {"messages": "input", "response_format": "text.format"}.get(param, param)
        assert error.error == {"message": named, "type": "invalid_request_error", "param": own, "code": "c"}
        assert (error.status, error.retry) == (400, False)
