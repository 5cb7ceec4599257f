"""The HTTP face: OpenAI's endpoints over the engine, with OpenAI's error object for everything that is wrong.

`make_app` is called by the command line and by tests. A handler reads and checks the body, tokenises, submits
to the engine and turns its events into one answer or a stream. If the client hangs up, the request is aborted.
"""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pshare_jax.errors import PshareError
from pshare_jax.serving.answers import Answer
from pshare_jax.serving.engine import Engine, EngineDown, EngineFull
from pshare_jax.serving.protocol import (
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    Limits,
    check_model,
    error_body,
    make_request,
    parse_body,
)
from pshare_jax.serving.request import FAILED, Event

T = TypeVar("T")
LONG_BODY = 16 * 1024
RETRY_SECONDS = "1"
SESSION_HEADERS = ("x-session-id", "x-openwebui-chat-id")
"""Headers in which clients name a growing context; the fields prompt_cache_key and user come after them."""


@runtime_checkable
class Encoder(Protocol):
    """Prompts to token ids (pshare_jax.tokenizer's); a prompt it cannot encode is a PshareError."""

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The ids of a text prompt; control tokens written in it are control tokens only if allowed."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a chat up to where the answer begins."""
        ...


@dataclass(frozen=True)
class Served:
    """What the api answers for: the engine, the task names in order, and the model's tokenizer and limits."""

    engine: Engine
    tasks: list[str]
    tokenizer: Encoder
    limits: Limits
    max_body_bytes: int = 8 * 1024 * 1024


def make_app(served: Served) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="pshare_jax", docs_url=None, redoc_url=None)
    created = int(time.time())
    cards = {name: _card(name, created, served.limits.max_len) for name in served.tasks}

    @app.get("/health")
    async def health() -> Response:
        healthy = served.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "unhealthy"}, 200 if healthy else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(cards.values())}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, served.tasks)
        return cards[name]

    @app.post("/v1/chat/completions", openapi_extra=_schema(ChatBody))
    async def chat(request: Request) -> Response:
        return await _answer(served, request, ChatBody)

    @app.post("/v1/completions", openapi_extra=_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        return await _answer(served, request, CompletionBody)

    app.add_middleware(RequestIds)
    _add_error_objects(app)
    return app


# --- one request -----------------------------------------------------------------------------------------------------


async def _answer(served: Served, http: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
    raw = await _read(http, served.max_body_bytes)
    body = await _maybe_threaded(len(raw), lambda: parse_body(kind, raw))
    check_model(body.model, served.tasks)
    prompt = await _maybe_threaded(len(raw), lambda: _encode(served.tokenizer, body))
    session = next((value for name in SESSION_HEADERS if (value := http.headers.get(name))), None)
    request = make_request(body, uuid.uuid4().hex, prompt, served.limits, session)
    events = _Events(served.engine, request.id)
    answer = Answer(body, request)
    try:
        served.engine.submit(request, events.put)
    except EngineFull:
        message = "The server has as many requests as it may hold; try again soon."
        raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded") from None
    except EngineDown:
        raise ApiError(503, "The server is stopping or a worker has died.", kind="server_error") from None
    watcher = asyncio.create_task(_abort_on_disconnect(http, events))
    try:
        first = await events.get()
        _raise_if_failed(first)
        if body.stream:
            lines = _stream(answer, first, events, watcher)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        event = first
        answer.add(event)
        while not event.last:
            event = await events.get()
            answer.add(event)
        _raise_if_failed(event)
        return JSONResponse(answer.whole(event))
    finally:
        if not body.stream or events.ended:
            watcher.cancel()


async def _stream(answer: Answer, event: Event, events: "_Events", watcher: asyncio.Task[None]) -> AsyncIterator[str]:
    try:
        for line in answer.start():
            yield line
        while True:
            for line in answer.chunks(event):
                yield line
            if event.last:
                return
            event = await events.get()
    finally:
        watcher.cancel()
        events.abort()


class _Events:
    """One request's events, carried from a worker's thread to the event loop."""

    def __init__(self, engine: Engine, request_id: str):
        self._engine = engine
        self._id = request_id
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self.ended = False

    def put(self, event: Event) -> None:
        """Called from a worker's thread; after the loop has closed there is nobody to tell."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:
            return

    async def get(self) -> Event:
        """The next event."""
        event = await self._queue.get()
        self.ended = event.last
        return event

    def abort(self) -> None:
        """Ends the request in the engine if it still lives."""
        if not self.ended:
            self._engine.abort(self._id)


async def _abort_on_disconnect(http: Request, events: _Events) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    events.abort()


def _raise_if_failed(event: Event) -> None:
    if event.failure is not None:
        raise ApiError(503 if event.finish_reason else 500, event.failure, kind="server_error")


def _encode(tokenizer: Encoder, body: Body) -> list[int]:
    try:
        if isinstance(body, CompletionBody):
            return tokenizer.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        tools = body.tools if body.tools and body.tool_choice != "none" else None
        return tokenizer.encode_chat(body.messages, tools=tools, template_kwargs=body.chat_template_kwargs)
    except PshareError as error:
        param = "prompt" if isinstance(body, CompletionBody) else "messages"
        raise ApiError(400, str(error), param=param) from None


async def _read(http: Request, max_bytes: int) -> bytes:
    kind = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Send the body as Content-Type: application/json, not {kind or 'nothing'}.")
    too_long = ApiError(413, f"The request body is larger than {max_bytes} bytes, which is the limit of this server.")
    if int(http.headers.get("content-length", "0")) > max_bytes:
        raise too_long
    raw = bytearray()
    async for part in http.stream():
        raw += part
        if len(raw) > max_bytes:
            raise too_long
    return bytes(raw)


async def _maybe_threaded(size: int, work: Callable[[], T]) -> T:
    """Runs short work at once and long work in a thread, so that it does not hold up other clients."""
    return await asyncio.to_thread(work) if size > LONG_BODY else work()


# --- around every request --------------------------------------------------------------------------------------------

ROUTES = "GET /health, GET /v1/models, POST /v1/chat/completions and POST /v1/completions"


class RequestIds:
    """ASGI middleware: every answer carries x-request-id, the client's own if it sent a plain one."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the call on, with the header added to the answer's start."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        sent = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = sent if re.fullmatch(rb"[!-~]{1,128}", sent) else uuid.uuid4().hex.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        return await self._app(scope, receive, send_with_id)


def _add_error_objects(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": RETRY_SECONDS} if error.status == 429 else None
        return JSONResponse(error_body(error.error), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        known = {
            404: f"There is no {request.url.path} on this server; it has {ROUTES}.",
            405: f"{request.url.path} does not take {request.method}; this server has {ROUTES}.",
        }
        shown = ApiError(error.status_code, known.get(error.status_code, str(error.detail)))
        return JSONResponse(error_body(shown.error), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(ApiError(500, FAILED, kind="server_error").error), 500)


def _card(name: str, created: int, max_len: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "pshare_jax", "max_model_len": max_len}


def _schema(kind: type[ChatBody] | type[CompletionBody]) -> dict[str, Any]:
    """The body's schema for /openapi.json (handlers read the body themselves, so FastAPI does not know it)."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}
