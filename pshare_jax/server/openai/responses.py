"""OpenAI's answer objects: whole answers and stream chunks of both endpoints. Host-side, imports no jax.

The api makes one `Answer` per call and feeds it the engine's events of all its choices; it knows the object names and
where text, log-probabilities and usage go.
"""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pshare_jax.engine.request import Event, Request, TokenLogprobs
from pshare_jax.server.openai.logprobs import TextLogprobs, chat_entry, joined
from pshare_jax.server.openai.schema import ApiError, Body, ChatBody, CompletionBody, error_body
from pshare_jax.text.encoder import Encoder

DONE = "data: [DONE]\n\n"
TOKEN_BYTES = 40
"""About what a token with its log-probability takes."""


class _Choice:
    """One choice so far; text and tokens are kept for whole answers only. `echo` is the prompt's text, if it is shown."""

    def __init__(self, request: Request, tokenizer: Encoder, echo: str | None):
        self.request, self.echo = request, echo
        self.text = ""
        self.tokens: list[TokenLogprobs] = []
        self.prompt: tuple[TokenLogprobs | None, ...] = ()
        self.text_logprobs = TextLogprobs(tokenizer)
        self.last = Event()
        self.seen = False

    def take(self, event: Event) -> list[TokenLogprobs]:
        """Takes an event; what is told about its token."""
        self.last, self.seen = event, True
        self.prompt = event.prompt_logprobs or self.prompt
        return [] if event.logprobs is None else [event.logprobs]


class Answer:
    """One call's answer in the form its endpoint and stream options ask for; choices in the order of `requests`."""

    def __init__(self, body: Body, request_id: str, requests: Sequence[Request], tokenizer: Encoder):
        self._body = body
        self._chat = isinstance(body, ChatBody)
        self._tokenizer, self._token_bytes = tokenizer, tokenizer.token_bytes
        echoes = _echoes(body, requests, tokenizer)
        self._choices = [_Choice(request, tokenizer, echo) for request, echo in zip(requests, echoes, strict=True)]
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    def add(self, index: int, event: Event) -> None:
        """Collects a choice's event for a whole answer."""
        choice = self._choices[index]
        choice.tokens += choice.take(event)
        choice.text += event.text

    def whole(self) -> dict[str, Any]:
        """The whole answer, after all events were added."""
        choices = []
        for index, one in enumerate(self._choices):
            text = (one.echo or "") + one.text
            message = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            echoed = self._echoed(one)
            logprobs = self._logprobs(one, one.tokens)
            logprobs = joined(echoed, logprobs) if echoed and logprobs else logprobs
            choices.append({"index": index, "logprobs": logprobs, "finish_reason": one.last.finish_reason, **message})
        return {**self._head, "choices": choices, "usage": self._usage()}

    @property
    def size(self) -> int:
        """About how many bytes the whole answer has."""
        tokens = sum(len(one.tokens) + len(one.prompt) for one in self._choices)
        return sum(len(one.text) for one in self._choices) + self._logprob_bytes(tokens)

    def size_of(self, event: Event) -> int:
        """About how many bytes an event's stream lines have."""
        return len(event.text) + self._logprob_bytes(len(event.prompt_logprobs))

    def _logprob_bytes(self, num_tokens: int) -> int:
        return TOKEN_BYTES * num_tokens * (1 + (self._body.num_logprobs or 0))

    def start(self) -> Iterator[str]:
        """What a stream begins with: each choice's role in a chat."""
        if self._chat:
            for index in range(len(self._choices)):
                yield self._chunk(index, {"role": "assistant", "content": ""})

    def lines(self, index: int, event: Event) -> list[str]:
        """A choice's event as stream lines: its text and token, and at its end the finish reason."""
        return list(self._chunks(index, event))

    def _chunks(self, index: int, event: Event) -> Iterator[str]:
        choice = self._choices[index]
        first = not choice.seen
        told = choice.take(event)
        if first and choice.echo is not None and event.failure is None:
            yield self._chunk(index, choice.echo, logprobs=self._echoed(choice))
        if event.text or told:
            content = {"content": event.text} if self._chat else event.text
            yield self._chunk(index, content, logprobs=self._logprobs(choice, told) if told else None)
        if event.failure is not None:
            yield _line(error_body(ApiError(500, event.failure, kind="server_error").error))
        elif event.finish_reason is not None:
            yield self._chunk(index, {} if self._chat else "", finish_reason=event.finish_reason)

    def end(self) -> Iterator[str]:
        """What follows the last choice's end: usage, if it was asked for, and [DONE]."""
        if self._body.include_usage and all(one.last.failure is None for one in self._choices):
            yield _line({**self._stream_head(), "choices": [], "usage": self._usage()})
        yield DONE

    @property
    def told(self) -> dict[str, Any]:
        """What the log says of the call."""
        usage = self._usage()
        return {
            "task": self._body.model,
            "stream": self._body.stream,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish_reasons": [one.last.finish_reason for one in self._choices],
        }

    def _logprobs(self, choice: _Choice, tokens: list[TokenLogprobs]) -> dict[str, Any] | None:
        if choice.request.logprobs is None:
            return None
        if self._chat:
            shown = [one for one in tokens if one.token_id not in choice.request.stop_ids]
            return {"content": [chat_entry(one, self._token_bytes) for one in shown], "refusal": None}
        return choice.text_logprobs.of([one.token_id for one in tokens], tokens)

    def _echoed(self, choice: _Choice) -> dict[str, Any] | None:
        """The prompt's log-probabilities; a text prompt does not show the control tokens that were put around it."""
        if not choice.prompt:
            return None
        prompt = choice.request.prompt
        return choice.text_logprobs.of(prompt, choice.prompt, shown=self._written(choice))

    def _written(self, choice: _Choice) -> range:
        """Which of the prompt's tokens were written by the client."""
        prompt = choice.request.prompt
        if choice.echo is None or not _is_text(self._body):
            return range(len(prompt))
        plain = tuple(self._tokenizer.encode(choice.echo, add_special_tokens=False))
        starts = range(len(prompt) - len(plain) + 1)
        start = next((one for one in starts if prompt[one : one + len(plain)] == plain), 0)
        return range(start, start + len(plain))

    def _chunk(
        self, index: int, content: Any, *, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
    ) -> str:
        part = {"delta": content} if self._chat else {"text": content}
        choice = {"index": index, **part, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk: dict[str, Any] = {**self._stream_head(), "choices": [choice]}
        if self._body.include_usage:
            chunk["usage"] = self._usage() if self._body.continuous_usage else None
        return _line(chunk)

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _usage(self) -> dict[str, Any]:
        """Each prompt counts once, however many choices it has; so does what was cached before the first of them."""
        prompts = [self._choices[first : first + self._body.n] for first in range(0, len(self._choices), self._body.n)]
        prompt_tokens = sum(len(choices[0].request.prompt) for choices in prompts)
        completion_tokens = sum(one.last.completion_tokens for one in self._choices)
        cached = sum(min((one.last.cached_tokens for one in choices if one.seen), default=0) for choices in prompts)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


def _echoes(body: Body, requests: Sequence[Request], tokenizer: Encoder) -> list[str | None]:
    """The prompt's text for each request whose answer begins with it: as it was sent, or all that its ids write."""
    if not (isinstance(body, CompletionBody) and body.echo):
        return [None] * len(requests)
    texts = [one if isinstance(one, str) else tokenizer.decode(one, skip_special_tokens=False) for one in body.prompts]
    return [text for text in texts for _ in range(body.n)]


def _is_text(body: Body) -> bool:
    return isinstance(body, CompletionBody) and isinstance(body.prompts[0], str)


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
