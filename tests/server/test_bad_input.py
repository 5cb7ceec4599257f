"""Invalid input of every kind in one table: the status, OpenAI's error object and the field; and the server stays healthy."""

import json
from typing import Any

import pytest
from fake_server import PATHS, error_of, serving
from serving_fakes import ByteTokenizer

from pshare_jax.server.openai.fields import NEUTRAL

pytestmark = pytest.mark.host
TEXT, CHAT = PATHS
BASE = {
    TEXT: {"model": "abc", "prompt": "p", "max_tokens": 3},
    CHAT: {"model": "abc", "messages": [{"role": "user", "content": "p"}], "max_tokens": 3},
    "/tokenize": {"prompt": "p"},
    "/detokenize": {"tokens": [65]},
}
MAX_LEN = 400
USER = {"role": "user", "content": "p"}
F = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": F}


def tool(name, **fields):
    return {"type": "function", "function": {**F, "name": name, **fields}}


# (paths, field, wrong values, status)
FIELDS: list[tuple[list[str], str, list[Any], int]] = [
    (PATHS, "model", [None, 5, "", "typo", "ABC", ["abc"]], 404),
    (PATHS, "max_tokens", ["5", 0, -1, 1.5, True, []], 400),
    (PATHS, "max_completion_tokens", ["5", 0, -1, {}, 2], 400),
    (PATHS, "temperature", ["1", -0.1, 2.1, [], True], 400),
    (PATHS, "top_p", ["1", -0.1, 1.1], 400),
    (PATHS, "top_k", [-2, 1.5, 1.0, "3", 2**31], 400),
    (PATHS, "min_p", [-0.1, 1.1, "x"], 400),
    (PATHS, "seed", ["x", 1.5, 2**63], 400),
    (PATHS, "n", [0, -1, 129, "2", True, 1.5], 400),
    (PATHS, "stop", [5, [5], ["a", 5], [""], "", ["a"] * 65, {}], 400),
    (PATHS, "stop_token_ids", ["x", [-1], ["a"], [True], 3], 400),
    (PATHS, "stream", ["true", 1, []], 400),
    (PATHS, "stream_options", [5, [], {"include_usage": "yes"}], 400),
    (PATHS, "ignore_eos", ["no", 0], 400),
    (PATHS, "min_tokens", [-1, "1", True, 4], 400),
    (PATHS, "presence_penalty", [-2.1, 2.1, "x"], 400),
    (PATHS, "frequency_penalty", [-2.1, 2.1, "x"], 400),
    (PATHS, "repetition_penalty", [0, -1, 1e-60, 101, "x"], 400),
    (PATHS, "logit_bias", [[], {"a": 1}, {"-1": 1}, {"260": 1}, {"1": 101}, {"1": "x"}, {"1": True}, {"٣": 1}], 400),
    (PATHS, "cache_salt", [5, []], 400),
    (PATHS, "user", [5, {}], 400),
    (PATHS, "prompt_cache_key", [5, []], 400),
    ([TEXT], "prompt", [None, 5, {}, [], "", [[]], ["a", [1]], [1, "a"], [1.5], [-1], [260], [True], [["a"]]], 400),
    ([TEXT], "prompt", [[1, True], [1.0], [[1, None]], ["a", 5], [[1], ["a"]]], 400),
    ([TEXT], "logprobs", [-1, 21, True, "x"], 400),
    ([TEXT], "echo", [1, "x"], 400),
    ([TEXT], "response_start", [0, 1, -1, "x", [1, 1], 1.5, True], 400),
    ([CHAT], "messages", [None, [], "p", {}, [5], [{}], [{"role": "user"}], [{**USER, "content": 5}]], 400),
    ([CHAT], "messages", [[{"role": "assistant", "content": "p"}], [{**USER, "tool_calls": 5}]], 400),
    ([CHAT], "logprobs", [1, "x"], 400),
    ([CHAT], "top_logprobs", [-1, 21, 2, "x"], 400),
    (
        [CHAT],
        "tools",
        [5, [5], {}, [{}], [F], [{**TOOL, "type": "web_search"}], [{"type": "function"}], [TOOL, TOOL]],
        400,
    ),
    ([CHAT], "tools", [[{"type": "custom", "custom": {"name": "f"}}], [tool(f"f{i}") for i in range(129)]], 400),
    ([CHAT], "tools", [[tool(name)] for name in (None, 5, "", "a b", "x" * 129, 'f"', "f\n", "auto", "required")], 400),
    ([CHAT], "tools", [[tool("f", **{key: 5})] for key in ("description", "parameters", "strict")], 400),
    ([CHAT], "tool_choice", ["required", {"type": "function", "function": {"name": "f"}}, 5, "any", {}, [], True], 400),
    ([CHAT], "tool_choice", [{"type": "allowed_tools"}, {"type": "function"}, {"type": "function", "name": "f"}], 400),
    ([CHAT], "parallel_tool_calls", ["yes", 0], 400),
    ([CHAT], "functions", [5, [5], {}, [{}], [TOOL], [F, F], [{**F, "parameters": "x"}]], 400),
    ([CHAT], "function_call", ["required", {"name": "f"}, {"name": 5}, 5], 400),
    ([CHAT], "messages", [[{**USER, "function_call": 5}]], 400),
    ([CHAT], "chat_template_kwargs", [5, []], 400),
    ([CHAT, "/tokenize"], "add_generation_prompt", [5, "no"], 400),
    ([CHAT, "/tokenize"], "continue_final_message", [5, "yes"], 400),
    (["/tokenize"], "prompt", [None, 5, []], 400),
    (["/tokenize"], "messages", [5, []], 400),
    (["/tokenize"], "return_token_strs", ["x"], 400),
    (["/detokenize"], "tokens", [None, "a", [-1], [260], [1.5], ["a"]], 400),
]
CASES = [(path, name, values, status) for paths, name, values, status in FIELDS for path in paths]
WRONG_MODEL_TYPES = (None, 5, ["abc"])


@pytest.fixture(scope="module")
def server():
    with serving(max_len=MAX_LEN) as running:
        yield running


def refused(server, path, body, status):
    response = server.client.post(path, json=body)
    return error_of(response, status)


@pytest.mark.parametrize(("path", "name", "values", "status"), CASES)
def test_wrong_values_are_refused_by_field_name(server, path, name, values, status):
    # Streams are refused in the same way, before the first byte.
    streamed = [{}, {"stream": True}] if path in PATHS and name != "stream" else [{}]
    for value in values:
        expected = 400 if name == "model" and value in WRONG_MODEL_TYPES else status
        for fields in streamed if value is values[0] else [{}]:
            error = refused(server, path, {**BASE[path], **fields, name: value}, expected)
            assert error["param"] == name
            assert name in error["message"]
            assert error["type"] == "invalid_request_error"


UNOFFERED = {
    "best_of": 2,
    "suffix": "x",
    "prompt_logprobs": 1,
    "length_penalty": 2.0,
    "bad_words": ["x"],
    "allowed_token_ids": [1],
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "modalities": ["audio"],
    "use_beam_search": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template": "x",
    "documents": [{}],
    "truncate_prompt_tokens": 5,
    "guided_whitespace_pattern": "x",
    "echo": True,
    "response_start": 1,
}


OFFERED = [
    *[(TEXT, name) for name in ("echo", "response_start")],
    *[(CHAT, name) for name in ("functions", "function_call", "add_generation_prompt", "continue_final_message")],
]


@pytest.mark.parametrize("name", NEUTRAL)
def test_unsupported_fields_are_refused_by_name_except_for_neutral_values(server, name):
    for path in PATHS:
        if (path, name) in OFFERED:
            continue
        error = refused(server, path, {**BASE[path], name: UNOFFERED[name]}, 400)
        assert error["param"] == name
        assert name in error["message"]
        for neutral in (None, *NEUTRAL[name]):
            assert server.client.post(path, json={**BASE[path], name: neutral}).status_code == 200


def test_fields_of_tools_that_contradict_each_other(server):
    named = {"type": "function", "function": {"name": "g"}}
    for fields, param, word in [
        ({"tools": [TOOL], "functions": [F]}, "functions", "only one"),
        ({"tools": [TOOL], "tool_choice": named}, "tool_choice", "'g'"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no function"),
        ({"functions": [F], "function_call": {"name": "g"}}, "function_call", "'g'"),
    ]:
        error = refused(server, CHAT, {**BASE[CHAT], **fields}, 400)
        assert error["param"] == param
        assert word in error["message"]


def test_a_task_without_a_form_of_calls_refuses_tools():
    with serving(tokenizer=ByteTokenizer(tool_format=None)) as server:
        for fields in ({"tools": [TOOL]}, {"functions": [F]}):
            error = refused(server, CHAT, {**BASE[CHAT], **fields}, 400)
            assert error["param"] == next(iter(fields))
            assert "tool_format" in error["message"]
        assert server.client.post(CHAT, json={**BASE[CHAT], "tools": [TOOL], "tool_choice": "none"}).status_code == 200


JSON = {"content-type": "application/json"}
RAW = [
    (b"", JSON, 400),
    (b"{", JSON, 400),
    (b"[]", JSON, 400),
    (b"null", JSON, 400),
    (b'"x"', JSON, 400),
    (b'{"model": "abc", "prompt": NaN}', JSON, 400),
    (b'{"model": "abc", "prompt": "p", "temperature": 1e999}', JSON, 400),
    (b'{"model": "abc", "prompt": "\\ud800"}', JSON, 400),
    (b'{"model": "abc", "prompt": "\xff"}', JSON, 400),
    (b'{"model": "\\udc00x", "prompt": "p"}', JSON, 400),
    (b'{"model": "abc", "prompt": "p", "a": {"\\ud800": 1}}', JSON, 400),
    (b'{"model": "abc", "prompt": "p", "a": ' + b"[" * 200 + b"]" * 200 + b"}", JSON, 400),
    (b'{"model": "abc", "prompt": "p", "temperature": Infinity}', JSON, 400),
    (b'{"model": "abc", "prompt": "p", "seed": ' + b"9" * 5000 + b"}", JSON, 400),
    (b"[" * 90_000, JSON, 400),
    (b'{"a":' * 200 + b"1" + b"}" * 200, JSON, 400),
    (b"model=abc", {"content-type": "application/x-www-form-urlencoded"}, 415),
    (b'{"model": "abc", "prompt": "p"}', {"content-type": "text/plain"}, 415),
    (b"x" * 100_001, JSON, 413),
    ((b"x" * 1000 for _ in range(101)), JSON, 413),
]


@pytest.mark.parametrize(("raw", "headers", "status"), RAW, ids=range(len(RAW)))
def test_malformed_bodies_are_refused(server, raw, headers, status):
    error_of(server.client.post(TEXT, content=raw, headers=headers), status)
    assert server.post().status_code == 200


ROUTES = [
    ("GET", "/v1/nothing", 404),
    ("GET", "/v1/responses", 405),
    ("GET", "/v1/responses/resp_1", 404),
    ("DELETE", "/v1/responses/resp_1", 404),
    ("POST", "/v1/responses/resp_1/cancel", 404),
    ("POST", "/v1/messages", 404),
    ("POST", "/v1/embeddings", 404),
    ("GET", "/v1/models/typo", 404),
    ("GET", "/v1/models/..%2F..%2Fetc", 404),
    ("GET", TEXT, 405),
    ("DELETE", "/v1/models", 405),
    ("PUT", "/tokenize", 405),
]


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
def test_unknown_routes_and_methods_are_refused(server, method, path, status):
    error_of(server.client.request(method, path), status)


def test_afterwards_the_server_works_and_holds_no_pages(server):
    assert server.post().json()["choices"][0]["text"] == "ABCDEFGH"
    server.rest()
    text = json.dumps(server.client.get("/openapi.json").json())
    assert all(json.dumps(name) in text for _, name, _, _ in CASES)
