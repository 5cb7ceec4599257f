"""Checks of /v1/responses: OpenAI's own types, and the order of a stream's events."""

import json
import re
from typing import Any

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

EVENT = TypeAdapter(ResponseStreamEvent)
LETTERS = {
    "response.created": "C",
    "response.in_progress": "P",
    "response.output_item.added": "A",
    "response.content_part.added": "a",
    "response.output_text.delta": "t",
    "response.output_text.done": "T",
    "response.content_part.done": "d",
    "response.function_call_arguments.delta": "f",
    "response.function_call_arguments.done": "F",
    "response.output_item.done": "D",
    "response.completed": "E",
    "response.incomplete": "E",
    "response.failed": "E",
}
ORDER = re.compile(r"CP(?:Aat*TdD|Af*FD)+E")
"""Created, in progress, one item after the other, the end."""


def checked(response: Any) -> dict[str, Any]:
    """A whole response that OpenAI's type accepts and whose parts agree."""
    Response.model_validate(response, strict=True)
    usage = response["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert response["store"] is False
    statuses = [item["status"] for item in response["output"]]
    assert set(statuses[:-1]) <= {"completed"}
    assert statuses[-1] == ("completed" if response["status"] == "completed" else "incomplete")
    assert len({item["id"] for item in response["output"]}) == len(statuses)
    return response


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream's text, each line checked."""
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        if not block.startswith(":"):
            name, data = re.fullmatch(r"event: (\S+)\ndata: (.*)", block).groups()  # type: ignore[union-attr]
            events.append(json.loads(data))
            assert events[-1]["type"] == name
    return events


def checked_stream(text: str) -> dict[str, Any]:
    """The response at the end of a stream whose events are complete, in order and agree with it."""
    events = events_of(text)
    for event in events:
        EVENT.validate_python(event, strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert ORDER.fullmatch("".join(LETTERS[event["type"]] for event in events)), [event["type"] for event in events]
    first, final = events[0]["response"], events[-1]["response"]
    assert events[-1]["type"] == f"response.{final['status']}"
    assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
    assert first["id"] == final["id"]
    _check_items(events, final["output"])
    return checked(final)


def _check_items(events: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == items
    for index, item in enumerate(items):
        own = [event for event in events if event.get("output_index") == index]
        assert {event["item_id"] for event in own if "item_id" in event} == {item["id"]}
        assert own[0]["item"]["id"] == item["id"]
        assert own[0]["item"]["status"] == "in_progress"
        deltas = [event for event in own if event["type"].endswith(".delta")]
        text = "".join(event["delta"] for event in deltas)
        if item["type"] == "function_call":
            assert text == item["arguments"] == own[-2]["arguments"]
            assert own[0]["item"] == {**item, "status": "in_progress", "arguments": ""}
        else:
            (part,) = item["content"]
            logprobs = [entry for event in deltas for entry in event["logprobs"]]
            assert (text, logprobs) == (part["text"], part["logprobs"])
            assert (own[-3]["text"], own[-3]["logprobs"], own[-2]["part"]) == (text, logprobs, part)


def plain(response: dict[str, Any]) -> dict[str, Any]:
    """What two answers to one request have in common: all but ids and times."""
    names = {"id", "created_at", "completed_at", "output"}
    items = [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in response["output"]]
    return {**{key: value for key, value in response.items() if key not in names}, "output": items}
