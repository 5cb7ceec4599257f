"""`response_format`, `guided_*` and `structured_outputs`: what an answer becomes, and the error of each wrong value."""

import json
import re

import pytest
from fake_server import PATHS, error_of, serving

from pshare_jax.server.openai.json_body import MAX_DEPTH
from pshare_jax.text.grammar import MAX_TEXT

pytestmark = pytest.mark.host
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Bonn"]}, "size": {"type": "integer", "minimum": 7, "maximum": 9}},
    "required": ["city", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server():
    with serving(max_body_bytes=1_000_000) as running:
        yield running


def answer(server, path, **fields):
    text, reason, _ = server.ask(path, max_tokens=80, **fields)
    return text, reason


def is_city(text):
    value = json.loads(text)
    return list(value) == ["city", "size"] and value["city"] in ("Rome", "Bonn") and value["size"] in (7, 8, 9)


def format_of(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


WANTED = {
    "json_object": ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
    "json_schema": ({"response_format": format_of(CITY)}, is_city),
    "strict": ({"response_format": format_of(CITY, strict=True)}, is_city),
    "guided_json": ({"guided_json": CITY}, is_city),
    "guided_json as text": ({"guided_json": json.dumps(CITY)}, is_city),
    "any JSON": ({"guided_json": True, "stop_token_ids": [257]}, lambda text: json.loads(text) is not ...),
    "guided_regex": ({"guided_regex": "[x-z]{3}|é+!"}, lambda text: re.fullmatch("[x-z]{3}|é+!", text)),
    "guided_choice": ({"guided_choice": ["yes", 'n"o\n']}, lambda text: text in ("yes", 'n"o\n')),
    "guided_grammar in Lark": ({"guided_grammar": 'start: "a" "b"? "c"'}, lambda text: text in ("ac", "abc")),
    "guided_grammar in GBNF": ({"guided_grammar": 'root ::= "a" [b-c]'}, lambda text: text in ("ab", "ac")),
    "json": ({"structured_outputs": {"json": CITY}}, is_city),
    "regex": (
        {"structured_outputs": {"regex": "q{1,3}z", "disable_any_whitespace": True}},
        lambda text: text[-1] == "z",
    ),
    "choice": ({"structured_outputs": {"choice": ["so"], "json": None}}, lambda text: text == "so"),
    "grammar": ({"structured_outputs": {"grammar": 'start: "g"'}}, lambda text: text == "g"),
    "any object": ({"structured_outputs": {"json_object": True}}, lambda text: isinstance(json.loads(text), dict)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", WANTED)
def test_every_field_constrains_the_answer(server, path, name):
    fields, matches = WANTED[name]
    text, reason = answer(server, path, **fields)
    assert reason == "stop"
    assert matches(text), text


@pytest.mark.parametrize("path", PATHS)
def test_neutral_values_constrain_nothing(server, path):
    free = server.ask(path)
    neutral = {"response_format": {"type": "text"}, "structured_outputs": {}, "guided_json": None}
    assert server.ask(path, **neutral) == free


@pytest.mark.parametrize("path", PATHS)
def test_every_choice_follows_the_grammar(server, path):
    prompt = {"messages": [{"role": "user", "content": "p"}]} if "chat" in path else {"prompt": ["p", "q"]}
    body = {"model": "abc", **prompt, "n": 3, "guided_regex": "A?B?C?D?E?F?G?H?x", "max_tokens": 12}
    choices = server.client.post(path, json=body).json()["choices"]
    texts = [choice["message"]["content"] if "chat" in path else choice["text"] for choice in choices]
    assert texts == ["ABCDEFGHx"] * (3 if "chat" in path else 6)


def test_without_an_end_token_an_answer_ends_with_its_grammar(server):
    text, reason = answer(server, PATHS[0], guided_choice=["ab", "abc"], ignore_eos=True)
    assert (text, reason) == ("abc", "stop")


def test_a_begun_answer_is_part_of_the_answer(server):
    body = {"model": "abc", "prompt": [*b'p{"ci'], "response_start": 1, "guided_json": CITY, "max_tokens": 80}
    choice = server.client.post(PATHS[0], json=body).json()["choices"][0]
    assert is_city('{"ci' + choice["text"])
    error = error_of(server.client.post(PATHS[0], json={**body, "prompt": [*b"p{ci"]}), 400)
    assert error["param"] == "guided_json"
    assert "begun answer" in error["message"]


REFUSED = {
    "an unknown kind": ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format", "schema"),
    "a schema that is a text": ({"response_format": format_of("{}")}, "response_format", "schema"),
    "a schema beside json_object": (
        {"response_format": {"type": "json_object", "schema": CITY}},
        "response_format",
        "response_format.schema",
    ),
    "a keyword": ({"response_format": format_of({"uniqueItems": True})}, "response_format", "uniqueItems"),
    "a deep keyword": ({"guided_json": {"items": {"not": {}}}}, "guided_json", ": not."),
    "the library's keyword": ({"guided_json": {"x-guidance": {"lenient": True}}}, "guided_json", "x-guidance"),
    "a remote schema": ({"guided_json": {"$ref": "https://example.com/x"}}, "guided_json", "$ref"),
    "nothing": ({"guided_json": False}, "guided_json", "Nothing satisfies"),
    "an endless schema": ({"guided_json": {"$ref": "#"}}, "guided_json", "Nothing satisfies"),
    "no JSON": ({"guided_json": "{"}, "guided_json", "JSON"),
    "JSON that is no schema": ({"guided_json": "[1]"}, "guided_json", "JSON Schema"),
    "deep JSON": ({"guided_json": '{"items":' * 5000 + "{}" + "}" * 5000}, "guided_json", "JSON"),
    "a deep schema": (
        {"guided_json": '{"items":' * MAX_DEPTH + "{}" + "}" * MAX_DEPTH},
        "guided_json",
        "nested too deeply",
    ),
    "a look-around": ({"guided_regex": "(?=a)b"}, "guided_regex", "look-around"),
    "an open bracket": ({"structured_outputs": {"regex": "["}}, "structured_outputs", "unclosed"),
    "an empty regex": ({"guided_regex": "", "ignore_eos": True}, "guided_regex", "no text"),
    "no choice": ({"guided_choice": []}, "guided_choice", "at least one"),
    "a choice that is no list": ({"structured_outputs": {"choice": "a"}}, "structured_outputs", "list of texts"),
    "no text": ({"structured_outputs": {"grammar": 5}}, "structured_outputs", "must be a text"),
    "neither Lark nor GBNF": ({"guided_grammar": "SELECT"}, "guided_grammar", "not GBNF"),
    "an unknown rule": ({"guided_grammar": "start: other"}, "guided_grammar", "other"),
    "an ignored part": ({"guided_grammar": 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'}, *["not"] * 2),
    "a long grammar": ({"guided_grammar": "start: " + '"a" ' * 50_001}, "guided_grammar", str(MAX_TEXT)),
    "an unknown key": ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs", "structural_tag"),
    "two fields": ({"guided_json": {}, "guided_regex": "x"}, "guided_regex", "guided_json and guided_regex"),
    "two keys": ({"structured_outputs": {"json": {}, "choice": ["x"]}}, "structured_outputs", "only one"),
    "a format and a field": (
        {"response_format": {"type": "json_object"}, "guided_choice": ["x"]},
        "guided_choice",
        "only one",
    ),
    "a pattern for blanks": ({"guided_whitespace_pattern": "x"}, "guided_whitespace_pattern", "not supported"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_obeyed_is_refused_by_name(server, path, name):
    fields, param, words = REFUSED[name]
    prompt = {"messages": [{"role": "user", "content": "p"}]} if "chat" in path else {"prompt": "p"}
    error = error_of(server.client.post(path, json={"model": "abc", **prompt, **fields}), 400)
    if param in fields:
        assert error["param"] == param
    assert words in error["message"]
    assert len(error["message"]) < 500
    assert server.engine.idle


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_leaves_its_grammar_fails_alone(server, path):
    """Ids that the grammar needs are stop ids of the request, so that nothing is allowed where they must come."""
    prompt = {"messages": [{"role": "user", "content": "p"}]} if "chat" in path else {"prompt": "p"}
    body = {"model": "abc", **prompt, "guided_choice": ["abc"], "stop_token_ids": [ord("b")]}
    error = error_of(server.client.post(path, json=body), 500)
    assert "stop token" in error["message"]
    assert server.ask(path, max_tokens=4)[0] == "ABCD"
    server.rest()
