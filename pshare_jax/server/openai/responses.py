"""OpenAI's response objects: full responses and stream chunks of both endpoints.

app.py makes one `ResponseBuilder` per call and passes it the engine's events of all choices.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pshare_jax.engine.request import Event, Request, TokenLogprobs
from pshare_jax.server.openai.json_bytes import dump
from pshare_jax.server.openai.logprobs import TextLogprobs, chat_entry, joined
from pshare_jax.server.openai.messages import ChatMessage, call_counts
from pshare_jax.server.openai.schema import ApiError, Body, ChatBody, CompletionBody, error_body
from pshare_jax.text.encoder import Encoder
from pshare_jax.text.tool_format import ToolFormat

DONE = "data: [DONE]\n\n"
TOKEN_BYTES = 40
"""Approximate JSON size of a token with its logprob."""


class _Choice:
    """The state of one choice; text and tokens are kept for full responses only. `echo`: the prompt's text, if requested.

    Its text is the content of a chat's `message`, or that of a completion.
    """

    def __init__(self, request: Request, tokenizer: Encoder, echo: str | None, message: ChatMessage | None):
        self.request, self.echo, self.message = request, echo, message
        self.text = ""
        self.tokens: list[TokenLogprobs] = []
        self.prompt: tuple[TokenLogprobs | None, ...] = ()
        self.text_logprobs = TextLogprobs(tokenizer)
        self.last = Event()
        self.seen = False

    def take(self, event: Event) -> list[TokenLogprobs]:
        """Records an event; returns the logprobs of its token, if any."""
        self.last, self.seen = event, True
        self.prompt = event.prompt_logprobs or self.prompt
        return [] if event.logprobs is None else [event.logprobs]

    @property
    def finish_reason(self) -> str | None:
        """The reason as its endpoint says it."""
        reason = self.last.finish_reason
        return reason if self.message is None else self.message.finish_reason(reason)

    def whole(self) -> dict[str, Any]:
        """The text of a full response, as its endpoint names it."""
        if self.message is not None:
            return {"message": self.message.whole(self.text)}
        return {"text": (self.echo or "") + self.text}

    def parts(self, event: Event) -> list[Any]:
        """What an event adds to a stream: deltas, or text."""
        if self.message is None:
            return [event.text] if event.text else []
        return self.message.deltas(event.text, last=event.finish_reason is not None and event.failure is None)


class ResponseBuilder:
    """Builds one call's response for its endpoint and stream options; choices are in the order of `requests`.

    `form` is how the task writes calls; only a chat with tools has it.
    """

    def __init__(
        self,
        body: Body,
        request_id: str,
        requests: Sequence[Request],
        tokenizer: Encoder,
        form: ToolFormat | None = None,
    ):
        self._body = body
        self._chat = isinstance(body, ChatBody)
        self._rules = body.call_rules if isinstance(body, ChatBody) else None
        self._tokenizer, self._token_bytes = tokenizer, tokenizer.token_bytes
        echoes = _echoes(body, requests, tokenizer)
        self._choices = [
            _Choice(request, tokenizer, echo, ChatMessage(self._rules, form) if self._chat else None)
            for request, echo in zip(requests, echoes, strict=True)
        ]
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    def add(self, index: int, event: Event) -> None:
        """Adds a choice's event to the full response."""
        choice = self._choices[index]
        choice.tokens += choice.take(event)
        choice.text += event.text

    def full(self) -> dict[str, Any]:
        """The full response, after all events were added."""
        choices = []
        for index, choice in enumerate(self._choices):
            content = choice.whole()
            echoed = self._prompt_logprobs(choice)
            logprobs = self._logprobs(choice, choice.tokens)
            logprobs = joined(echoed, logprobs) if echoed and logprobs else logprobs
            reason = choice.finish_reason
            choices.append({"index": index, "logprobs": logprobs, "finish_reason": reason, **content})
        return {**self._head, "choices": choices, "usage": self._usage()}

    @property
    def size(self) -> int:
        """The approximate size of the full response in bytes."""
        tokens = sum(len(choice.tokens) + len(choice.prompt) for choice in self._choices)
        return sum(len(choice.text) for choice in self._choices) + self._logprob_bytes(tokens)

    def size_of(self, event: Event) -> int:
        """The approximate size of an event's stream lines in bytes."""
        return len(event.text) + self._logprob_bytes(len(event.prompt_logprobs))

    def _logprob_bytes(self, num_tokens: int) -> int:
        return TOKEN_BYTES * num_tokens * (1 + (self._body.num_logprobs or 0))

    def start(self) -> Iterator[str]:
        """The first lines of a stream: each choice's role in a chat."""
        if self._chat:
            for index in range(len(self._choices)):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def lines(self, index: int, event: Event) -> list[str]:
        """A choice's event as stream lines: its text and logprobs, and at the end the finish reason."""
        return list(self._chunks(index, event))

    def _chunks(self, index: int, event: Event) -> Iterator[str]:
        choice = self._choices[index]
        first = not choice.seen
        tokens = choice.take(event)
        if first and choice.echo is not None and event.failure is None:
            yield self._chunk(index, choice.echo, logprobs=self._prompt_logprobs(choice), large=True)
        logprobs = self._logprobs(choice, tokens) if tokens else None
        for part in choice.parts(event) or ([{"content": ""} if self._chat else ""] if tokens else []):
            yield self._chunk(index, part, logprobs=logprobs)
            logprobs = None
        if event.failure is not None:
            yield _line(error_body(ApiError(500, event.failure, kind="server_error").error))
        elif event.finish_reason is not None:
            yield self._chunk(index, {} if self._chat else "", finish_reason=choice.finish_reason)

    def end(self) -> Iterator[str]:
        """The last lines of a stream: usage, if requested, and [DONE]."""
        if self._body.include_usage and all(choice.last.failure is None for choice in self._choices):
            yield _line({**self._stream_head(), "choices": [], "usage": self._usage()})
        yield DONE

    @property
    def log_fields(self) -> dict[str, Any]:
        """The call's fields in the request log."""
        usage = self._usage()
        return {
            "task": self._body.model,
            "stream": self._body.stream,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish_reasons": [choice.finish_reason for choice in self._choices],
            **call_counts(self._rules, (choice.message.parts for choice in self._choices if choice.message)),
        }

    def _logprobs(self, choice: _Choice, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        if choice.request.logprobs is None:
            return None
        if self._chat:
            shown = [token for token in tokens if token.token_id not in choice.request.stop_ids]
            return {"content": [chat_entry(token, self._token_bytes) for token in shown], "refusal": None}
        return choice.text_logprobs.of([token.token_id for token in tokens], tokens)

    def _prompt_logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        """The prompt's logprobs; the echoed text excludes control tokens that the tokenizer added."""
        if not choice.prompt:
            return None
        return choice.text_logprobs.of(choice.request.prompt, choice.prompt, visible=self._client_tokens(choice))

    def _client_tokens(self, choice: _Choice) -> range:
        """The indices of the prompt's tokens that the client sent, without those that the tokenizer added."""
        prompt = choice.request.prompt
        if choice.echo is None or not _is_text(self._body):
            return range(len(prompt))
        plain = tuple(self._tokenizer.encode(choice.echo, add_special_tokens=False))
        starts = range(len(prompt) - len(plain) + 1)
        start = next((at for at in starts if prompt[at : at + len(plain)] == plain), 0)
        return range(start, start + len(plain))

    def _chunk(
        self,
        index: int,
        content: Any,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        large: bool = False,
    ) -> str:
        part = {"delta": content} if self._chat else {"text": content}
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk: dict[str, Any] = {**self._stream_head(), "choices": [choice]}
        if self._body.include_usage:
            chunk["usage"] = self._usage() if self._body.continuous_usage else None
        return f"data: {dump(chunk).decode()}\n\n" if large else _line(chunk)

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _usage(self) -> dict[str, Any]:
        """Each prompt counts once for all its choices; its cached tokens are those of its first admitted choice."""
        prompts = [self._choices[first : first + self._body.n] for first in range(0, len(self._choices), self._body.n)]
        prompt_tokens = sum(len(choices[0].request.prompt) for choices in prompts)
        completion_tokens = sum(choice.last.completion_tokens for choice in self._choices)
        cached = sum(min((c.last.cached_tokens for c in choices if c.seen), default=0) for choices in prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _echoes(body: Body, requests: Sequence[Request], tokenizer: Encoder) -> list[str | None]:
    """The prompt's text for each request with `echo`: the text as sent, or the decoded ids."""
    if not (isinstance(body, CompletionBody) and body.echo):
        return [None] * len(requests)
    texts = [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=False) for p in body.prompts]
    return [text for text in texts for _ in range(body.n)]


def _is_text(body: Body) -> bool:
    return isinstance(body, CompletionBody) and isinstance(body.prompts[0], str)


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
