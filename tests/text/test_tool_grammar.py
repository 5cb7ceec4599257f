"""Answers with function calls: random answers under a tool grammar are calls of the tools, in the format's own text."""

import json
import re

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from random_schemas import Schemas, random_answer
from serving_fakes import EOS, VOCAB, ByteTokenizer

from pshare_jax.errors import PshareError
from pshare_jax.text.grammar import Grammar, GrammarCompiler, GrammarFailed
from pshare_jax.text.tool_format import FORMATS, ToolFormat
from pshare_jax.text.tool_grammar import tool_grammar

pytestmark = pytest.mark.host
COMPILER = GrammarCompiler(ByteTokenizer(), VOCAB)
ODD = 'a"b\\c/é\n'
FORMS = [*FORMATS.values(), ToolFormat("odd", "<|t|>/[a]*(\\ ", " $</|t|>", "list", 'the "arguments"')]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name, parameters=None, **more):
    function = {"name": name, **({} if parameters is None else {"parameters": parameters}), **more}
    return {"type": "function", "function": function}


TOOLS = [tool("weather", CITY, strict=True), tool("now"), tool(ODD, {})]


def text_of(form, calls):
    """Calls as the format writes them."""
    bodies = [json.dumps({"name": name, form.arguments_key: what}, ensure_ascii=False) for name, what in calls]
    if form.body == "list":
        return f"{form.start}[{', '.join(bodies)}]{form.end}"
    return "\n".join(form.start + body + form.end for body in bodies)


def calls_of(form, text):
    """The calls in a text of nothing else, as (name, arguments)."""
    found, decoder = [], json.JSONDecoder()
    while text:
        assert text.startswith(form.start)
        value, end = decoder.raw_decode(text, len(form.start))
        assert text[end:].startswith(form.end)
        text = re.sub(r"^(; |\n)", "", text[end + len(form.end) :])
        found += value if form.body == "list" else [value]
    assert all(list(call) == ["name", form.arguments_key] for call in found)
    return [tuple(call.values()) for call in found]


def allows(grammar, text):
    """Whether the text may be a whole answer; `text` may hold control tokens as ids."""
    matcher = COMPILER.matcher(grammar, [EOS])
    try:
        for token in text.encode() if isinstance(text, str) else text:
            matcher.push(token)
        mask = np.zeros((1, VOCAB // 32 + 1), np.int32)
        matcher.fill(mask[0])
    except GrammarFailed:
        return False
    return bool(np.unpackbits(mask.view(np.uint8), bitorder="little")[EOS])


@pytest.fixture(params=FORMS, ids=lambda form: form.name)
def form(request):
    return request.param


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choice", ["required", "weather", ODD])
def test_random_answers_are_calls_that_parse(form, choice, parallel):
    likely, num_finished, most = [*b'"}]'], 0, 0
    for seed in range(12):
        schemas = Schemas(seed)
        parameters = schemas.object(1)
        tools = [*TOOLS[1:], tool("weather", parameters)]
        try:
            grammar = tool_grammar(form, tools, choice, parallel)
            assert grammar is not None
            matcher = COMPILER.matcher(grammar, [EOS])
        except PshareError:
            continue
        ids, finished = random_answer(matcher, VOCAB, {EOS}, likely, schemas.rng, 600)
        if not finished:
            continue
        num_finished += 1
        calls = calls_of(form, bytes(ids).decode())
        most = max(most, len(calls))
        assert len(calls) == 1 or (parallel and choice == "required" and calls)
        for name, arguments in calls:
            assert name in ("weather", "now", ODD) if choice == "required" else name == choice
            assert isinstance(arguments, dict)
            if name == "weather":
                Draft202012Validator(parameters).validate(arguments)
    assert num_finished > 2
    assert most >= (2 if parallel and choice == "required" else 1)


def test_auto_constrains_a_call_once_the_model_has_begun_it(form):
    grammar = tool_grammar(form, TOOLS, "auto", True)
    good = text_of(form, [("weather", {"city": "Bonn"})])
    for text in ("", "Some text.", "Text {with} [brackets]", good, text_of(form, [("now", {"any": [1]})])):
        assert allows(grammar, text), text
    for call in (("weather", {"town": "Bonn"}), ("weather", {}), ("then", {})):
        assert not allows(grammar, text_of(form, [call]))
    if form.start:
        assert allows(grammar, "Text. " + good)
        assert not allows(grammar, "Text. " + text_of(form, [("weather", {})]))
        assert not allows(grammar, "Text. " + good[:-1])


def test_parallel_calls(form):
    two = [("weather", {"city": "Bonn"}), ("now", {})]
    for choice in ("auto", "required"):
        assert allows(tool_grammar(form, TOOLS, choice, True), text_of(form, two))
        assert not allows(tool_grammar(form, TOOLS, choice, False), text_of(form, two))
    assert not allows(tool_grammar(form, TOOLS, "now", True), text_of(form, [two[1]] * 2))


def test_a_forced_call_is_all_of_the_answer(form):
    for choice in ("required", "now"):
        grammar = tool_grammar(form, TOOLS, choice, False)
        text = text_of(form, [("now", {})])
        assert allows(grammar, text)
        for other in ("", "Text.", "Text. " + text, text + " Text."):
            assert not allows(grammar, other)


def test_auto_without_a_strict_tool_constrains_nothing(form):
    assert tool_grammar(form, TOOLS[1:], "auto", True) is None


def test_beside_another_grammar_an_answer_is_calls_or_what_that_allows(form):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    for tools in (TOOLS, TOOLS[1:]):
        grammar = tool_grammar(form, tools, "auto", True, None, Grammar.of_schema(schema))
        assert allows(grammar, '{"x": 1}')
        assert allows(grammar, text_of(form, [("now", {}), (ODD, {"x": 2})]))
        for text in ("", "Text.", '{"x": "1"}', text_of(form, [("then", {})])):
            assert not allows(grammar, text)


@pytest.mark.parametrize("body", ["object", "list"])
def test_a_marker_that_is_a_control_token_must_be_the_token(body):
    special = COMPILER.special_tokens
    form = ToolFormat("special", "<258>\n", "<259>", body)
    call = text_of(ToolFormat("", body=body), [("weather", {"city": "é"})]).encode()
    answer = [258, *b"\n", *call, 259]
    for choice in ("auto", "required", "weather"):
        grammar = tool_grammar(form, TOOLS, choice, False, special)
        assert allows(grammar, answer)
        assert allows(grammar, [*b"Text. ", *answer]) is (choice == "auto")
        assert not allows(grammar, answer[:-1])
        # Spelled out it is text like any other.
        assert allows(grammar, b"<258>\n") is (choice == "auto")


REFUSED = {
    "an unknown function": ([TOOLS[0]], "then", "'then'"),
    "no tools": ([], "required", "'required'"),
    "a keyword": ([tool("f", {"properties": {"x": {"x-guidance": {}}}})], "required", "'f'"),
    "no object": ([tool("f", {"type": "array"})], "f", "object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_constrained_is_refused(form, name):
    tools, choice, words = REFUSED[name]
    with pytest.raises(PshareError, match=words):
        tool_grammar(form, tools, choice, True)


def test_references_in_parameters_are_to_the_parameters(form):
    parameters = {"$defs": {"n": {"type": "integer"}}, "properties": {"x": {"$ref": "#/$defs/n"}}, "required": ["x"]}
    tools = [tool("f", parameters), tool("g", {**parameters, "$defs": {"n": {"type": "string"}}})]
    grammar = tool_grammar(form, tools, "required", True)
    assert allows(grammar, text_of(form, [("f", {"x": 1}), ("g", {"x": "1"})]))
    assert not allows(grammar, text_of(form, [("f", {"x": "1"})]))
    assert not allows(grammar, text_of(form, [("g", {"x": 1})]))
