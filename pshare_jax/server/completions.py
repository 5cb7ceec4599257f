"""One call of /v1/chat/completions or /v1/completions: body, tokens, engine requests, and their events as the response.

app.py adds it to both routes. If anything fails, or the client disconnects, all requests of the call are aborted.
"""

import asyncio
import uuid
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from pshare_jax.engine.engine import Engine, EngineDown, EngineFull, UnknownTask
from pshare_jax.engine.failures import RequestBanned
from pshare_jax.engine.request import Event
from pshare_jax.errors import PshareError
from pshare_jax.server.event_queue import EventQueue
from pshare_jax.server.event_stream import EventStream, first_event
from pshare_jax.server.middleware import CLIENT_CLOSED_REQUEST
from pshare_jax.server.openai.bodies import maybe_threaded, read_body
from pshare_jax.server.openai.json_bytes import LargeJSONResponse
from pshare_jax.server.openai.responses import ResponseBuilder
from pshare_jax.server.openai.schema import (
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    check_model,
    unavailable,
    unknown_model,
)
from pshare_jax.server.openai.to_requests import Limits, check_num_choices, make_requests, too_long
from pshare_jax.text.tokenizer import Encoder, PromptTooLong

SESSION_HEADERS = ("x-session-id", "x-openwebui-chat-id")
"""Headers that name a session (a growing context); they take precedence over prompt_cache_key and user."""


class Completions:
    """Answers calls with an engine."""

    def __init__(self, engine: Engine, tokenizer: Encoder, limits: Limits, max_body_bytes: int):
        self._engine, self._tokenizer, self._limits = engine, tokenizer, limits
        self._max_body_bytes = max_body_bytes

    async def answer(self, http: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
        """The response to a call; a streamed one begins with its first event, or after a while without it.

        Raises:
            ApiError: the call is refused, or has failed before its response began.
        """
        body, size = await read_body(http, kind, self._max_body_bytes)
        check_model(body.model, self._engine.tasks)
        check_num_choices(body, self._limits)
        session = next((value for name in SESSION_HEADERS if (value := http.headers.get(name))), None)
        request_id = uuid.uuid4().hex
        requests = await maybe_threaded(
            size, lambda: make_requests(body, request_id, self._encode(body), self._limits, session)
        )
        call = _Call(EventQueue(self._engine, requests), http.state.log_fields)
        try:
            # Hashing the pages of long prompts takes time too.
            await maybe_threaded(size, lambda: self._submit(call.events, body))
            call.response = response = ResponseBuilder(body, request_id, requests, self._tokenizer)
            call.watcher = asyncio.create_task(_abort_on_disconnect(http, call.events))
            return await (_streamed(response, call) if body.stream else _whole(response, call.events))
        finally:
            if not call.streams:
                call.end()

    def _submit(self, events: EventQueue, body: Body) -> None:
        try:
            events.submit()
        except EngineFull as error:
            message = str(error)
            raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry=True) from None
        except UnknownTask:
            # The task was unloaded after the body was read.
            raise unknown_model(body.model, self._engine.tasks) from None
        except RequestBanned as error:
            raise ApiError(422, str(error), kind="server_error", code="request_banned", retry=False) from None
        except EngineDown:
            raise unavailable() from None

    def _encode(self, body: Body) -> list[list[int]]:
        tokenizer, max_len = self._tokenizer, self._limits.max_len
        param = "prompt" if isinstance(body, CompletionBody) else "messages"
        try:
            if isinstance(body, CompletionBody):
                texts = body.prompts
                return [
                    tokenizer.encode(text, refuse_from=max_len) if isinstance(text, str) else text for text in texts
                ]
            tools = body.tools if body.tools and body.tool_choice != "none" else None
            kwargs = body.chat_template_kwargs
            return [tokenizer.encode_chat(body.messages, tools=tools, template_kwargs=kwargs, refuse_from=max_len)]
        except PromptTooLong as error:
            raise too_long(f"at least {error.least}", max_len, param) from None
        except PshareError as error:
            raise ApiError(400, str(error), param=param) from None


class _Call:
    """What must end with a call, whatever happens to it."""

    def __init__(self, events: EventQueue, log_fields: dict[str, Any]):
        self.events, self._log_fields = events, log_fields
        self.response: ResponseBuilder | None = None
        self.watcher: asyncio.Task[None] | None = None
        self.streams = False
        """Whether a `_Stream` ends it."""

    def end(self) -> None:
        """Aborts what is unfinished and fills in the log line."""
        self.events.abort()
        if self.watcher is not None:
            self.watcher.cancel()
        if self.response is not None:
            self._log_fields.update(self.response.log_fields)
        if self.events.disconnected:
            self._log_fields["status"] = CLIENT_CLOSED_REQUEST


class _Stream(EventStream):
    """An event stream that ends its call, also if it fails before its first line."""

    def __init__(self, response: ResponseBuilder, first: tuple[int, Event] | None, call: _Call):
        super().__init__(response, first, call.events)
        self._call = call
        call.streams = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.end()


async def _streamed(response: ResponseBuilder, call: _Call) -> Response:
    first = await first_event(call.events)
    if first is not None:
        _raise_if_failed(first[1], call.events)
    return _Stream(response, first, call)


async def _whole(response: ResponseBuilder, events: EventQueue) -> Response:
    while not events.ended:
        found = await events.get()
        if found is not None:
            _raise_if_failed(found[1], events)
            response.add(*found)
    return await maybe_threaded(response.size, lambda: LargeJSONResponse(response.full()))


async def _abort_on_disconnect(http: Request, events: EventQueue) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    events.disconnected = True
    events.abort()


def _raise_if_failed(event: Event, events: EventQueue) -> None:
    if event.failure is None:
        return
    if events.disconnected:
        raise ApiError(CLIENT_CLOSED_REQUEST, "The client closed the request.")
    if event.retry or event.finish_reason:
        code = "timed_out" if event.retry else "unavailable"
        raise ApiError(503, event.failure, kind="server_error", code=code, retry=True)
    raise ApiError(500, event.failure, kind="server_error", code="request_failed", retry=event.retry)
