"""OpenAI's answer objects: whole answers and stream chunks of both endpoints. Host-side, imports no jax.

The api makes one `Answer` per request and feeds it the engine's events; it knows the object names and where text and
usage go.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

from pshare_jax.serving.protocol import ApiError, Body, ChatBody, error_body
from pshare_jax.serving.request import Event, Request

DONE = "data: [DONE]\n\n"


class Answer:
    """One request's answer in the form its endpoint and stream options ask for."""

    def __init__(self, body: Body, request: Request):
        self._body = body
        self._chat = isinstance(body, ChatBody)
        self._prompt_tokens = len(request.prompt)
        self._text = ""
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{request.id}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    def add(self, event: Event) -> None:
        """Collects an event's text for a whole answer."""
        self._text += event.text

    def whole(self, last: Event) -> dict[str, Any]:
        """The whole answer, after all events were added."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": last.finish_reason}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": self._text}
        else:
            choice["text"] = self._text
        return {**self._head, "choices": [choice], "usage": self._usage(last)}

    def start(self) -> Iterator[str]:
        """What a stream begins with: a chat's role."""
        if self._chat:
            yield self._chunk({"role": "assistant", "content": ""}, None, Event())

    def chunks(self, event: Event) -> Iterator[str]:
        """The event as stream lines: its text if there is any, and at the end the finish reason, usage and [DONE]."""
        if event.text:
            yield self._chunk({"content": event.text} if self._chat else event.text, None, event)
        if event.failure is not None:
            yield _line(error_body(ApiError(500, event.failure, kind="server_error").error))
        elif event.finish_reason is not None:
            yield self._chunk({} if self._chat else "", event.finish_reason, event)
            if self._body.include_usage:
                yield _line({**self._stream_head(), "choices": [], "usage": self._usage(event)})
        if event.last:
            yield DONE

    def _chunk(self, content: Any, finish_reason: str | None, event: Event) -> str:
        part = {"delta": content} if self._chat else {"text": content}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish_reason}
        chunk: dict[str, Any] = {**self._stream_head(), "choices": [choice]}
        if self._body.include_usage:
            chunk["usage"] = self._usage(event) if self._body.continuous_usage else None
        return _line(chunk)

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _usage(self, event: Event) -> dict[str, Any]:
        completion_tokens = event.completion_tokens
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": event.cached_tokens},
        }


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
