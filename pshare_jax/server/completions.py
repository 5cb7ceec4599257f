"""One call of an endpoint that generates: body, tokens, engine requests, and their events as the response.

app.py adds it to the routes, each with its kind of body and of response. If anything fails, or the client disconnects, all
requests of the call are aborted.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from pshare_jax.engine.engine import Engine, EngineDown, EngineFull, UnknownTask
from pshare_jax.engine.failures import RequestBanned
from pshare_jax.engine.request import Event
from pshare_jax.engine.request import Request as EngineRequest
from pshare_jax.errors import PshareError
from pshare_jax.server.event_queue import EventQueue, Mailbox
from pshare_jax.server.event_stream import CallResponse, EventStream, first_event
from pshare_jax.server.middleware import CLIENT_CLOSED_REQUEST
from pshare_jax.server.openai.bodies import maybe_threaded, read_body
from pshare_jax.server.openai.json_bytes import LargeJSONResponse
from pshare_jax.server.openai.schema import (
    ApiError,
    Body,
    CallBody,
    ChatBody,
    CompletionBody,
    check_model,
    unavailable,
    unknown_model,
)
from pshare_jax.server.openai.structured import Constraint, answer_grammar, constraint_of, refused
from pshare_jax.server.openai.to_requests import Limits, Prompt, check_num_choices, make_requests, too_long
from pshare_jax.text.chat_style import StyleOf
from pshare_jax.text.encoder import Encoder, PromptTooLong
from pshare_jax.text.grammar import BadGrammar, Grammar
from pshare_jax.text.tool_format import ToolFormat, as_shown

SESSION_HEADERS = ("x-session-id", "x-openwebui-chat-id")
"""Headers that name a session (a growing context); they take precedence over fields of the body: agent_hint.session,
prompt_cache_key and user.
"""

GRAMMAR_THREADS = 2
"""Grammars that are made at once: each takes a core."""

Respond = Callable[[Any, str, Sequence[EngineRequest], Encoder, ToolFormat | None], CallResponse]
"""Makes the response of a call, from its body (of the endpoint's kind), its id, its requests, and how its text writes calls."""
CountCalls = Callable[[str, int, int], None]
"""Counts the calls in answers of a task, and those that could not be read."""


class Completions:
    """Answers calls with an engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Encoder,
        limits: Limits,
        max_body_bytes: int,
        count_calls: CountCalls,
        style_of: StyleOf,
        count_unknown_hints: Callable[[int], None],
    ):
        """`count_unknown_hints` gets the number of unknown keys in a call's `agent_hint`."""
        self._engine, self._tokenizer, self._limits, self._style_of = engine, tokenizer, limits, style_of
        self._max_body_bytes, self._count_calls = max_body_bytes, count_calls
        self._control = [tokenizer.token_bytes(index).decode() for index in tokenizer.special_ids]
        self._count_unknown_hints = count_unknown_hints
        self._grammar_threads = ThreadPoolExecutor(GRAMMAR_THREADS, "grammar")
        self._events: Mailbox | None = None

    async def answer(self, http: Request, kind: type[CallBody], respond: Respond) -> Response:
        """The response to a call; a streamed one begins with its first event, or after a while without it.

        Raises:
            ApiError: the call is refused, or has failed before its response began.
        """
        sent, size = await read_body(http, kind, self._max_body_bytes)
        try:
            return await self._answer(http, sent, size, respond)
        except ApiError as error:
            raise sent.renamed(error) from None

    async def _answer(self, http: Request, sent: CallBody, size: int, respond: Respond) -> Response:
        body = sent.generation
        check_model(body.model, self._engine.tasks)
        check_num_choices(body, self._limits)
        if body.agent_hint is not None:
            self._count_unknown_hints(body.agent_hint.num_unknown)
        session = next((value for name in SESSION_HEADERS if (value := http.headers.get(name))), None)
        request_id = uuid.uuid4().hex
        form, constraint = self._tool_format(body), constraint_of(body)
        grammar = await self._grammar(body, constraint, form)
        requests = await maybe_threaded(
            size, lambda: make_requests(body, request_id, self._encode(body), self._limits_of(body), session, grammar)
        )
        call = _Call(EventQueue(self._engine, requests, self._mailbox()), http.state.log_fields, self._count_calls)
        try:
            # Hashing the pages of long prompts takes time too.
            await maybe_threaded(size, lambda: self._submit(call.events, body, constraint))
            shown = None if form is None else as_shown(form, self._control)
            call.response = response = respond(sent, request_id, requests, self._tokenizer, shown)
            call.watcher = asyncio.create_task(_abort_on_disconnect(http, call.events))
            return await (_streamed(response, call) if body.stream else _whole(response, call.events))
        finally:
            if not call.streams:
                call.end()

    def _mailbox(self) -> Mailbox:
        """That of the running event loop, for the events of all calls."""
        loop = asyncio.get_running_loop()
        if self._events is None or self._events.loop is not loop:
            self._events = Mailbox(loop)
        return self._events

    async def _grammar(self, body: Body, constraint: Constraint | None, form: ToolFormat | None) -> Grammar | None:
        """The body's grammar, made and compiled in a thread: a large one takes two seconds, for which other calls with grammars
        may have to wait, but not long bodies.
        """
        if constraint is None and form is None:
            return None
        compiler = self._engine.facts.grammars
        assert compiler is not None, "a server's engine has grammars"
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._grammar_threads, answer_grammar, body, constraint, form, compiler)

    def _submit(self, events: EventQueue, body: Body, constraint: Constraint | None) -> None:
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
        except BadGrammar as error:
            # It does not go with the begun answer.
            raise refused(constraint.field if constraint else "tools", error) from None

    def _limits_of(self, body: Body) -> Limits:
        """The limits, with what ends the answers of the body's task."""
        ends = self._tokenizer.turn_ends(self._style_of(body.model))
        return replace(self._limits, stop_ids=self._limits.stop_ids | ends) if ends else self._limits

    def _tool_format(self, body: Body) -> ToolFormat | None:
        """How the answer writes calls; None if it has none to write."""
        if not isinstance(body, ChatBody) or body.call_rules is None:
            return None
        form = self._tokenizer.tool_format(self._style_of(body.model))
        if form is None:
            field = body.call_rules.field
            message = (
                f"{field} needs a task with a known form of calls, and {body.model!r} has none; set its tool_format in the "
                "config or in decode_module.json, or tool_choice to none."
            )
            raise ApiError(400, message, param=field)
        return form

    def _encode(self, body: Body) -> list[Prompt]:
        tokenizer, max_len = self._tokenizer, self._limits.max_len
        param = "prompt" if isinstance(body, CompletionBody) else "messages"
        try:
            if isinstance(body, CompletionBody):
                texts = body.prompts
                prompts = [
                    tokenizer.encode(text, refuse_from=max_len) if isinstance(text, str) else text for text in texts
                ]
                return list(map(Prompt, prompts, body.response_starts(len(prompts))))
            options = {
                "tools": body.prompt_tools or None,
                "template_kwargs": body.chat_template_kwargs,
                "refuse_from": max_len,
                "style": self._style_of(body.model),
            }
            if body.continues:
                return [Prompt(*tokenizer.encode_begun(body.messages, **options))]
            prompt = body.add_generation_prompt
            return [Prompt(tokenizer.encode_chat(body.messages, add_generation_prompt=prompt, **options))]
        except PromptTooLong as error:
            raise too_long(f"at least {error.least}", max_len, param) from None
        except PshareError as error:
            raise ApiError(400, str(error), param=param) from None


class _Call:
    """What must end with a call, whatever happens to it."""

    def __init__(self, events: EventQueue, log_fields: dict[str, Any], count_calls: CountCalls):
        self.events, self._log_fields, self._count_calls = events, log_fields, count_calls
        self.response: CallResponse | None = None
        self.watcher: asyncio.Task[None] | None = None
        self.streams = False
        """Whether a `_Stream` ends it."""

    def end(self) -> None:
        """Aborts what is unfinished and fills in the log line."""
        self.events.abort()
        if self.watcher is not None:
            self.watcher.cancel()
        if self.response is not None:
            fields = self.response.log_fields
            self._log_fields.update(fields)
            if "tool_calls" in fields:
                self._count_calls(fields["task"], fields["tool_calls"], fields["broken_calls"])
        if self.events.disconnected:
            self._log_fields["status"] = CLIENT_CLOSED_REQUEST


class _Stream(EventStream):
    """An event stream that ends its call, also if it fails before its first line."""

    def __init__(self, response: CallResponse, first: tuple[int, Event] | None, call: _Call):
        super().__init__(response, first, call.events)
        self._call = call
        call.streams = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.end()


async def _streamed(response: CallResponse, call: _Call) -> Response:
    first = await first_event(call.events)
    if first is not None:
        _raise_if_failed(first[1], call.events)
    return _Stream(response, first, call)


async def _whole(response: CallResponse, events: EventQueue) -> Response:
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
