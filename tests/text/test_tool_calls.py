"""Answers of every format to text and calls: a table, all splits of it, and random answers and splits."""

import dataclasses
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pshare_jax.text.tool_calls import CallPiece, ToolCallParser
from pshare_jax.text.tool_format import FORMATS, ToolFormat, as_shown

pytestmark = pytest.mark.host
NAMES = ["f", "g", "get.weather", "ü-名"]
HERMES, LLAMA, LIST = FORMATS["hermes"], FORMATS["llama3"], FORMATS["json_list"]
FORMS = {
    **FORMATS,
    "marked_list": ToolFormat("mistral", "[TOOL_CALLS]", "", "list"),
    "odd": ToolFormat("odd", "aab", "a"),
}


def joined(pieces):
    """The text, and each call's name and arguments."""
    text, calls = "", []
    for piece in pieces:
        if isinstance(piece, str):
            assert piece
            text += piece
        elif piece.name is not None:
            assert piece.index == len(calls)
            assert piece.arguments == ""
            calls.append([piece.name, ""])
        else:
            assert piece.index == len(calls) - 1
            assert piece.arguments
            calls[-1][1] += piece.arguments
    return text, [tuple(call) for call in calls]


def parsed(form, pieces, names=NAMES):
    parser = ToolCallParser(form, names)
    given = [piece for text in pieces for piece in parser.push(text)]
    return *joined([*given, *parser.finish()]), parser.num_broken


F = '{"name": "f", "arguments": {"a": 1}}'
G = '{"name": "g", "parameters": {"b": ["}", "\\"{", {"c": null}]}}'
CALL_F, CALL_G = ("f", '{"a": 1}'), ("g", '{"b": ["}", "\\"{", {"c": null}]}')
CUT_F = '{"name": "f", "arguments": {"a": "'
WRONG_F = '{"name": "f", "arguments": {"a": [1}}'
SAME = None
"""The text is unchanged."""

# (format, answer, text, calls, broken)
BODIES = [
    (F, [CALL_F]),
    (G, [CALL_G]),
    (f"[{F}]", [CALL_F]),
    (f"[ {F} ,\n{G}, {F}]", [CALL_F, CALL_G, CALL_F]),
    (f"{F}\n{G}", [CALL_F, CALL_G]),
    (f"{F}; {G} ;", [CALL_F, CALL_G]),
    ('{"name":"f","arguments":{}}', [("f", "{}")]),
    ('{"name": "f"}', [("f", "{}")]),
    ('{"name": "f", "arguments": null}', [("f", "{}")]),
    ('{"name": "f", "arguments": ""}', [("f", "{}")]),
    ('{"arguments": {"a": {"name": "x"}}, "name": "f"}', [("f", '{"a": {"name": "x"}}')]),
    ('{"type": "function", "id": 7, "name": "f", "x": [{}], "arguments": {"a": 1}, "y": "}"}', [CALL_F]),
    ('{"name": "f", "name": "g", "arguments": {"a": 1}, "parameters": {}}', [CALL_F]),
    ('{"name": "f", "arguments": "{\\"a\\": \\"\\\\u00e9 }\\"}"}', [("f", '{"a": "\\u00e9 }"}')]),
    ('{"arguments": "{\\"a\\": 1}", "name": "f"}', [CALL_F]),
    ('{"n\\u0061me": "\\u00fc-名", "arguments": {"é": "名😀"}}', [("ü-名", '{"é": "名😀"}')]),
    ('{ "name" :\t"get.weather" ,\r\n"arguments"\n: { "a" : "\\\\" } }', [("get.weather", '{ "a" : "\\\\" }')]),
]
OTHER_ARGUMENTS = [
    ("[1, 2]", "[1, 2]"),
    ('"no"', '"no"'),
    ("5", "5"),
    ("{1}", "{1}"),
    ('{"a": tru}', '{"a": tru}'),
    ('{"a": NaN}', '{"a": NaN}'),
]
UNMARKED_TEXT = [
    "",
    " \n",
    "Hello.",
    "  The answer is {1}. ",
    '{"name": "Bob", "age": 3}',
    '[{"name": "Bob"}]',
    '{"answer": {"name": "f", "arguments": {}}}',
    '{"a": 1, "name": "f", "arguments": {}}',
    f"Sure: {F}",
    "[]",
    "{}",
    "[1, 2]",
    "[[",
    "{",
    '{"name": 5}',
    '{"name": ""}',
    '{"name": "f',
    '{"arguments": {"a": 1}}',
    '{"arguments": {"a": 1], "name": "f"}',
    '"f"',
    "<tool_call>\n" + F,
]
TABLE = [
    *((LLAMA, f" {body}\n", "", calls, 0) for body, calls in BODIES),
    *((HERMES, f"<tool_call>\n{body}\n</tool_call>", "", calls, 0) for body, calls in BODIES),
    *((FORMS["marked_list"], f"[TOOL_CALLS] {body}", "", calls, 0) for body, calls in BODIES),
    *((LLAMA, f'{{"name": "f", "arguments": {raw}}}', "", [("f", text)], 1) for raw, text in OTHER_ARGUMENTS),
    *((LIST, text, SAME, [], 0) for text in UNMARKED_TEXT),
    *((HERMES, text, SAME, [], 0) for text in UNMARKED_TEXT[:-1]),
    # Text around calls.
    (HERMES, f"I see.\n\n<tool_call>{F}</tool_call>\n", "I see.", [CALL_F], 0),
    (HERMES, f"\n A\n<tool_call>\n{F}\n</tool_call> B <tool_call>{G}</tool_call>C ", "\n A\nB C ", [CALL_F, CALL_G], 0),
    (HERMES, f"A<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>\nB", "A\nB", [CALL_F, CALL_G], 0),
    (HERMES, f"\n<tool_call>{F}</tool_call>\n Done.\n", "Done.\n", [CALL_F], 0),
    (LLAMA, f"\n{F} Done.", "Done.", [CALL_F], 0),
    (LLAMA, f"{F}\n{{}}", "{}", [CALL_F], 0),
    (LLAMA, f'{F} {{"name": "unknown"}}', '{"name": "unknown"}', [CALL_F], 0),
    (FORMS["odd"], f"aaab{F}aa aab{G}aab", "aa ab", [CALL_F, CALL_G], 0),
    # Unknown names: a call where a marker says so, or where it stands in a list behind a call.
    (HERMES, '<tool_call>\n{"name": "no", "arguments": {}}\n</tool_call>', "", [("no", "{}")], 0),
    (LIST, f'[{F}, {{"name": "no"}}]', "", [CALL_F, ("no", "{}")], 0),
    (LIST, f'[{{"name": "no"}}, {F}]', SAME, [], 0),
    # Broken off, or not JSON.
    (HERMES, f"A <tool_call>\n{F}", "A", [CALL_F], 0),
    (HERMES, f"A <tool_call>\n{F[:-1]}", "A", [CALL_F], 0),
    (HERMES, f"A <tool_call>{F}</tool_c", "A", [CALL_F], 0),
    (HERMES, f"A <tool_call>\n{CUT_F}", "A", [("f", '{"a": "')], 1),
    (LIST, f"[{F}, {CUT_F}\\", "", [CALL_F, ("f", '{"a": "\\')], 1),
    (LLAMA, '{"name": "f"', "", [("f", "")], 1),
    (LLAMA, '{"name": "f", "arguments": "{\\"a', "", [("f", "")], 1),
    (LLAMA, f"{WRONG_F} x", "}} x", [("f", '{"a": [1')], 1),
    (HERMES, f"<tool_call>{F[:-1]}</tool_call>", "", [CALL_F], 0),
    (
        HERMES,
        f"<tool_call>{WRONG_F}</tool_call> <tool_call>{F}</tool_call>",
        "}}</tool_call>",
        [("f", '{"a": [1'), CALL_F],
        1,
    ),
    (HERMES, f"<tool_call>\n<tool_call>\n{F}\n</tool_call>", "<tool_call>", [CALL_F], 1),
    (HERMES, "<tool_call>\nnone</tool_call>", SAME, [], 1),
    (HERMES, " <tool_call>\n [] ", SAME, [], 1),
    (HERMES, "1 < 2 <tool <tool_call", SAME, [], 0),
    (LIST, f"[{F}, 5]", "5]", [CALL_F], 0),
    (LIST, f"[{F}", "", [CALL_F], 0),
]


@pytest.mark.parametrize(("form", "answer", "text", "calls", "broken"), TABLE)
def test_answers(form, answer, text, calls, broken):
    expected = (answer if text is SAME else text, calls, broken)
    assert parsed(form, [answer]) == expected
    assert parsed(form, answer) == expected
    for at in range(1, len(answer)):
        assert parsed(form, [answer[:at], answer[at:]]) == expected


PARTS = [F, G, CUT_F, WRONG_F, '{"name": "no", ', "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "aab", '"name": "f"']
PARTS += ['"arguments": ', *'[]{},:"\\ \n;xé5a']


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(FORMS)),
    st.lists(st.sampled_from(PARTS), max_size=12),
    st.randoms(use_true_random=False),
)
def test_any_answer_is_the_same_however_it_is_split(name, parts, draw):
    answer = "".join(parts)
    whole = parsed(FORMS[name], [answer])
    assert parsed(FORMS[name], answer) == whole
    cuts = sorted(draw.randint(0, len(answer)) for _ in range(3))
    assert parsed(FORMS[name], [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]) == whole
    if not whole[1]:
        assert whole[0] == answer


TEXT = st.text(max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(TEXT, JSON, max_size=3)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(FORMS)), CALLS, st.booleans(), st.booleans(), st.booleans())
def test_the_calls_that_a_model_writes_are_read_back(name, calls, ascii_only, wrapped, first):
    form = FORMS[name]

    def written(name, arguments):
        value = json.dumps(arguments, ensure_ascii=ascii_only) if wrapped else arguments
        members = [("name", name), (form.arguments_key, value)]
        return dict(members[::-1] if first else members)

    objects = [written(*call) for call in calls]
    bodies = [json.dumps(one, ensure_ascii=ascii_only) for one in ([objects] if form.body == "list" else objects)]
    answer = "\n".join(form.start + body + form.end for body in bodies)
    text, read, broken = parsed(form, answer)
    assert (text, broken) == ("", 0)
    assert [(name, json.loads(arguments)) for name, arguments in read] == calls


def test_text_is_given_at_once_and_markers_are_held_back():
    parser = ToolCallParser(HERMES, NAMES)
    assert parser.push("I call") == ["I call"]
    assert parser.push(" it <to") == [" it"]
    assert parser.push("ol") == []
    assert parser.push("s>") == [" <tools>"]
    assert parser.push('<tool_call>{"name": "f') == []
    assert parser.push('", "arguments": {"a') == [CallPiece(0, "f"), CallPiece(0, arguments='{"a')]
    assert parser.push('": 1}') == [CallPiece(0, arguments='": 1}')]
    assert parser.push("}") == []
    assert parser.finish() == []


def test_other_json_is_text_as_soon_as_its_first_key_shows_it():
    parser = ToolCallParser(LLAMA, NAMES)
    assert parser.push('{"answer"') == ['{"answer"']
    assert parser.push(': "') == [': "']
    parser = ToolCallParser(LLAMA, NAMES)
    assert parser.push('{"name": "Bob"') == ['{"name": "Bob"']


@pytest.mark.parametrize("form", [HERMES, LLAMA])
@pytest.mark.parametrize("unit", ["a", '\\"', "{}", "]]", ' "x": '])
def test_long_arguments_are_read_once(form, unit):
    parser = ToolCallParser(form, NAMES)
    draw = random.Random(0)
    answer = form.start + '{"name": "f", "arguments": {"a": ' + json.dumps(unit * (5_000 // len(unit)))
    at = 0
    while at < len(answer):
        size = draw.randint(1, 8)
        parser.push(answer[at : at + size])
        at += size
        # What is kept for the next push is the text of this one.
        assert len(parser._source._text) <= size + len(form.start)


def test_markers_that_are_control_tokens_are_not_shown():
    control = ["[CALLS]", "</s>", "<tool"]
    assert as_shown(HERMES, ["</s>"]) == HERMES
    assert as_shown(HERMES, control) == dataclasses.replace(HERMES, start="_call>\n")
    form = ToolFormat("custom", "[CALLS] ", "\n</s>", "list")
    shown = as_shown(form, control)
    assert (shown.start, shown.end, shown.body) == ("", "", "list")
    assert parsed(shown, [f" [{F}, {G}]\n"]) == ("", [CALL_F, CALL_G], 0)
