"""Whole responses and stream events from the engine's events, for any text, calls and way of splitting them."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from responses_checks import checked, checked_stream, plain
from serving_fakes import EOS, ByteTokenizer

from pshare_jax.engine.request import ABORTED, Event, Request, TokenLogprobs
from pshare_jax.server.openai.json_body import parse_body
from pshare_jax.server.responses_api.response import ResponsesBuilder
from pshare_jax.server.responses_api.schema import ResponsesBody
from pshare_jax.text.tool_calls import CallPiece, ToolCallParser
from pshare_jax.text.tool_format import FORMATS

pytestmark = pytest.mark.host
TOOLS = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("f", "get_weather")]
REQUEST = Request("r", "m", (1, 2, 3), 50, stop_ids=frozenset({EOS}))


def builder(form=None, tools=(), request=REQUEST):
    raw = {"model": "m", "input": "p", "tools": list(tools)}
    return ResponsesBuilder(
        parse_body(ResponsesBody, json.dumps(raw).encode()), "abc", [request], ByteTokenizer(), form
    )


def streamed(events, **options):
    made = builder(**options)
    lines = [*made.start()]
    for event in events:
        lines += made.lines(0, event)
    return checked_stream("".join([*lines, *made.end()]))


def whole(events, **options):
    made = builder(**options)
    for event in events:
        made.add(0, event)
    return checked(made.full())


def answer(texts, **end):
    """The events of an answer: a token for each text, and the end."""
    events = [Event(text, number, cached_tokens=2) for number, text in enumerate(texts, 1)]
    return [*events, Event("", len(texts) + 1, cached_tokens=2, **(end or {"finish_reason": "stop"}))]


def split(text, cuts):
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in pairwise(places)]


cuts = st.lists(st.integers(0, 1000), max_size=12)
odd_text = st.text(max_size=30) | st.text(alphabet='<tool_cal>/\n{}[]"name:f, ', max_size=40)
values = st.recursive(st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2), max_leaves=4)
calls = st.tuples(st.sampled_from(["f", "get_weather", "unknown"]), st.dictionaries(st.text(max_size=4), values))
answers = st.lists(odd_text | calls, max_size=4)
ends = st.sampled_from([{"finish_reason": "stop"}, {"finish_reason": "length"}, {"error": "It broke."}])


def written(form, parts):
    """An answer as a model writes it."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        else:
            call = json.dumps({"name": part[0], form.arguments_key: part[1]})
            texts.append(f"{form.start}{f'[{call}]' if form.body == 'list' else call}{form.end}")
    return "".join(texts)


@settings(deadline=None)
@given(st.sampled_from(sorted(FORMATS)), answers, cuts, ends)
def test_events_agree_with_the_whole_response_and_with_the_parser(name, parts, places, end):
    form = FORMATS[name]
    text = written(form, parts)
    options = {"form": form, "tools": TOOLS}
    final = streamed(answer(split(text, places), **end), **options)
    assert plain(final) == plain(whole(answer([text], **end), **options)) | {"usage": final["usage"]}
    items = final["output"]
    parser = ToolCallParser(form, {"f", "get_weather"})
    pieces = [*parser.push(text), *parser.finish()]
    shown = "".join(part["text"] for item in items if item["type"] == "message" for part in item["content"])
    assert shown == "".join(piece for piece in pieces if isinstance(piece, str))
    called: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                called.append([piece.name, ""])
            called[piece.index][1] += piece.arguments
    assert [[item["name"], item["arguments"]] for item in items if item["type"] == "function_call"] == called


@settings(deadline=None)
@given(st.text(max_size=40), cuts, st.booleans())
def test_without_tools_any_answer_is_one_message(text, places, has_form):
    options = {"form": FORMATS["hermes"]} if has_form else {"tools": TOOLS}
    final = streamed(answer(split(text, places)), **options)
    (item,) = final["output"]
    assert item["content"] == [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    assert (item["role"], final["status"]) == ("assistant", "completed")


def test_calls_and_texts_are_items_in_their_order():
    form = FORMATS["hermes"]
    text = written(form, ["Let me look. ", ("f", {"a": 1}), ("f", {}), "Done."])
    final = streamed(answer([*text]), form=form, tools=TOOLS)
    kinds = [item["type"] for item in final["output"]]
    assert kinds == ["message", "function_call", "function_call", "message"]
    assert len({item["call_id"] for item in final["output"][1:3]}) == 2
    assert [json.loads(item["arguments"]) for item in final["output"][1:3]] == [{"a": 1}, {}]


@pytest.mark.parametrize(
    ("end", "status", "details", "error"),
    [
        ({"finish_reason": "stop"}, "completed", None, None),
        ({"finish_reason": "length"}, "incomplete", {"reason": "max_output_tokens"}, None),
        ({"error": "It broke."}, "failed", None, {"code": "server_error", "message": "It broke."}),
        ({"finish_reason": "abort"}, "failed", None, {"code": "server_error", "message": ABORTED}),
    ],
)
def test_ends(end, status, details, error):
    final = streamed(answer(["a", "b"], **end))
    assert (final["status"], final["incomplete_details"], final["error"]) == (status, details, error)
    assert (final["completed_at"] is not None) == (status == "completed")
    assert final["usage"]["input_tokens"] == 3
    assert final["usage"]["input_tokens_details"]["cached_tokens"] == 2
    assert final["usage"]["output_tokens"] == 3


def scored(text, token_id, number):
    return Event(text, number, logprobs=TokenLogprobs(token_id, -0.5, ((token_id, -0.5), (1, -1.5))))


def test_logprobs_are_those_of_the_texts_tokens():
    request = Request("r", "m", (1,), 50, stop_ids=frozenset({EOS}), logprobs=2)
    events = [scored(chr(token), token, number) for number, token in enumerate(b"hi!", 1)]
    # The end token has none in a chat.
    final = streamed([*events, scored("", EOS, 4), Event("", 4, "stop")], request=request)
    (part,) = final["output"][0]["content"]
    assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]) == b"hi!"
    assert part["logprobs"][0]["top_logprobs"][0] == {"token": "h", "logprob": -0.5, "bytes": [104]}


def test_logprobs_of_calls_are_left_out():
    form = FORMATS["hermes"]
    request = Request("r", "m", (1,), 50, stop_ids=frozenset({EOS}), logprobs=2)
    text = "Look: " + written(form, [("f", {"a": "b"})])
    events = [scored(char, ord(char), number) for number, char in enumerate(text, 1)]
    final = streamed([*events, Event("", len(text), "stop")], request=request, form=form, tools=TOOLS)
    (part,) = final["output"][0]["content"]
    shown = bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode()
    assert shown == part["text"] == "Look:"
    assert final["output"][1]["type"] == "function_call"
