"""The response object of POST /v1/responses, whole or as a stream of events."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pshare_jax.engine.request import Event, Request
from pshare_jax.server.openai.json_bytes import dump
from pshare_jax.server.openai.logprobs import chat_entry
from pshare_jax.server.openai.messages import AnswerParts, call_counts
from pshare_jax.server.openai.responses import TOKEN_BYTES
from pshare_jax.server.responses_api.output import Output
from pshare_jax.server.responses_api.schema import ResponsesBody
from pshare_jax.text.encoder import Encoder
from pshare_jax.text.tool_format import ToolFormat

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class ResponsesBuilder:
    """Builds one call's response. A whole response is what the last event of a stream has.

    `form` is how the task writes calls; only a body with tools has it.
    """

    def __init__(
        self,
        body: ResponsesBody,
        request_id: str,
        requests: Sequence[Request],
        tokenizer: Encoder,
        form: ToolFormat | None = None,
    ):
        (self._request,) = requests
        self._body, self._token_bytes = body, tokenizer.token_bytes
        self._head = {"id": f"resp_{request_id}", "object": "response", "created_at": int(time.time())}
        self._output = Output(request_id)
        self._parts = AnswerParts(body.generation.call_rules, form)
        self._last = Event()
        self._num_events = 0
        self._bytes = 0

    def add(self, index: int, event: Event) -> None:
        """Adds an event to the whole response."""
        for _ in self._advance(event):
            pass

    def full(self) -> dict[str, Any]:
        """The whole response, after all events were added."""
        return self._response(self._status)

    @property
    def size(self) -> int:
        """The approximate size of the whole response in bytes."""
        return self._bytes + self._body.echo_bytes

    def size_of(self, event: Event) -> int:
        """The approximate size of an event's lines in bytes: the first and last have the request's fields."""
        size = self._size(event) + (self._body.echo_bytes if self._num_events == 0 else 0)
        return size + (self.size if event.last else 0)

    def start(self) -> Iterator[str]:
        """The first lines of a stream."""
        for kind in ("created", "in_progress"):
            yield self._line({"type": f"response.{kind}", "response": self._response("in_progress")})

    def lines(self, index: int, event: Event) -> list[str]:
        """An event as stream lines; after the last event the response itself."""
        lines = [self._line(data) for data in self._advance(event)]
        if event.last:
            lines.append(self._line({"type": f"response.{self._status}", "response": self.full()}))
        return lines

    def end(self) -> Iterator[str]:
        """Nothing: the last event's lines end the stream."""
        return iter(())

    @property
    def log_fields(self) -> dict[str, Any]:
        """The call's fields in the request log, named as those of a chat."""
        usage = self._usage()
        return {
            "task": self._body.model,
            "stream": self._body.stream,
            "prompt_tokens": usage["input_tokens"],
            "cached_tokens": usage["input_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["output_tokens"],
            "finish_reasons": [self._last.finish_reason],
            **call_counts(self._body.generation.call_rules, [self._parts]),
        }

    @property
    def _status(self) -> Status:
        """The status after the last event."""
        if self._last.failure is not None:
            return "failed"
        return "incomplete" if self._parts.reason(self._last.finish_reason) == "length" else "completed"

    def _advance(self, event: Event) -> Iterator[dict[str, Any]]:
        self._last = event
        self._bytes += self._size(event)
        token = event.logprobs
        if token is not None and token.token_id not in self._request.stop_ids:
            self._output.add_logprobs([chat_entry(token, self._token_bytes)])
        for piece in self._parts.push(event.text, last=event.last):
            yield from self._output.add(piece)
        if event.last:
            yield from self._output.finish("completed" if self._status == "completed" else "incomplete")

    def _size(self, event: Event) -> int:
        return len(event.text) + (TOKEN_BYTES * (1 + (self._request.logprobs or 0)) if event.logprobs else 0)

    def _line(self, data: dict[str, Any]) -> str:
        kind = data["type"]
        numbered = {"type": kind, "sequence_number": self._num_events, **data}
        self._num_events += 1
        # Deltas are short and many; all other events may be large.
        short = kind.endswith(".delta")
        text = json.dumps(numbered, ensure_ascii=False, separators=(",", ":")) if short else dump(numbered).decode()
        return f"event: {kind}\ndata: {text}\n\n"

    def _response(self, status: Status) -> dict[str, Any]:
        running = status == "in_progress"
        return {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": {"code": "server_error", "message": self._last.failure} if status == "failed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self._body.echo,
            "output": [] if running else self._output.items,
            "usage": None if running else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        num_input, num_output = len(self._request.prompt), self._last.completion_tokens
        return {
            "input_tokens": num_input,
            # Tokens are cached without being asked for, so none is counted as a write.
            "input_tokens_details": {"cached_tokens": self._last.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_input + num_output,
        }
