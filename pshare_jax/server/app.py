"""The HTTP application: OpenAI's endpoints over the engine, with OpenAI's error object for every error.

`make_app` is called by the command line and by tests. A handler reads and checks the body, tokenises, submits to the
engine and turns its events into a response or a stream. If the client disconnects, its requests are aborted.
"""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from pshare_jax.engine.engine import Engine, EngineDown, EngineFull, UnknownTask
from pshare_jax.engine.request import Event
from pshare_jax.engine.request import Request as Choice
from pshare_jax.errors import PshareError
from pshare_jax.server.dashboard.page import add_live_page
from pshare_jax.server.dashboard.stats import DashboardStats
from pshare_jax.server.metrics import Metrics
from pshare_jax.server.middleware import CLIENT_CLOSED_REQUEST, Middleware
from pshare_jax.server.openai.bodies import maybe_threaded, read_body
from pshare_jax.server.openai.responses import ResponseBuilder
from pshare_jax.server.openai.schema import (
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    body_schema,
    check_model,
    error_body,
    unavailable,
    unknown_model,
)
from pshare_jax.server.openai.to_requests import Limits, check_num_choices, make_requests
from pshare_jax.server.openai.tokenize import add_token_routes
from pshare_jax.server.tasks.api import add_task_routes
from pshare_jax.server.tasks.table import TaskTable
from pshare_jax.text.tokenizer import Encoder

RETRY_SECONDS = "1"
SESSION_HEADERS = ("x-session-id", "x-openwebui-chat-id")
"""Headers that name a session (a growing context); they take precedence over prompt_cache_key and user."""


@dataclass(frozen=True)
class AppContext:
    """What the handlers need: the engine, the tokenizer and limits, and the base's name.

    With a `task_table` clients may change the tasks.
    """

    engine: Engine
    tokenizer: Encoder
    limits: Limits
    max_body_bytes: int = 8 * 1024 * 1024
    api_key: str | None = None
    base: str = ""
    task_table: TaskTable | None = None

    @property
    def tasks(self) -> list[str]:
        """The names of the served tasks, in order."""
        return self.engine.tasks


def make_app(context: AppContext) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="pshare_jax", docs_url=None, redoc_url=None)
    created = int(time.time())
    # Clients read a schema once, so it must not list tasks that may change.
    fixed_tasks = context.tasks if context.task_table is None else []

    def card(name: str) -> dict[str, Any]:
        return _model_card(name, created, context.limits.max_len)

    @app.get("/health")
    async def health() -> Response:
        healthy = context.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "unhealthy"}, 200 if healthy else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in context.tasks]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, context.tasks)
        return card(name)

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody, fixed_tasks))
    async def chat(request: Request) -> Response:
        return await _complete(context, request, ChatBody)

    @app.post("/v1/completions", openapi_extra=body_schema(CompletionBody, fixed_tasks))
    async def completions(request: Request) -> Response:
        return await _complete(context, request, CompletionBody)

    metrics = Metrics(context.engine)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/flush_cache")
    async def flush_cache() -> dict[str, Any]:
        return {"flushed_pages": context.engine.flush_cache()}

    add_token_routes(app, context.tokenizer, context.limits, context.max_body_bytes)
    add_live_page(app, DashboardStats(context.engine, context.base))
    if context.task_table is not None:
        add_task_routes(app, context.task_table, context.max_body_bytes)
    app.add_middleware(Middleware, api_key=context.api_key)
    _add_error_objects(app)
    return app


# --- one request -----------------------------------------------------------------------------------------------------


async def _complete(context: AppContext, http: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
    body, size = await read_body(http, kind, context.max_body_bytes)
    check_model(body.model, context.tasks)
    check_num_choices(body, context.limits)
    prompts = await maybe_threaded(size, lambda: _encode(context.tokenizer, body))
    session = next((value for name in SESSION_HEADERS if (value := http.headers.get(name))), None)
    request_id = uuid.uuid4().hex
    requests = make_requests(body, request_id, prompts, context.limits, session)
    events = _EventQueue(context.engine, [request.id for request in requests])
    _submit(context, requests, events)
    response = ResponseBuilder(body, request_id, requests, context.tokenizer)
    watcher = asyncio.create_task(_abort_on_disconnect(http, events))
    streams = False
    try:
        index, event = await events.get()
        _raise_if_failed(event, events)
        if body.stream:
            streams = True
            lines = _stream(response, index, event, events, watcher, http.state.log_fields)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        response.add(index, event)
        while not events.ended:
            index, event = await events.get()
            _raise_if_failed(event, events)
            response.add(index, event)
        return await maybe_threaded(response.size, lambda: JSONResponse(response.full()))
    finally:
        if not streams:
            _end(response, events, watcher, http.state.log_fields)


def _submit(context: AppContext, requests: Sequence[Choice], events: "_EventQueue") -> None:
    """Submits all engine requests of a call, or none."""
    try:
        context.engine.submit_all(requests, [functools.partial(events.put, index) for index in range(len(requests))])
    except EngineFull as error:
        raise ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded") from None
    except UnknownTask:
        # The task was unloaded after the body was read.
        raise unknown_model(requests[0].task, context.tasks) from None
    except EngineDown:
        raise unavailable() from None


async def _stream(
    response: ResponseBuilder,
    index: int,
    event: Event,
    events: "_EventQueue",
    watcher: asyncio.Task[None],
    log_fields: dict[str, Any],
) -> AsyncIterator[str]:
    try:
        for line in response.start():
            yield line
        while True:
            size = response.size_of(event)
            for line in await maybe_threaded(size, functools.partial(response.lines, index, event)):
                yield line
            if events.ended or event.failure is not None:
                break
            index, event = await events.get()
        for line in response.end():
            yield line
    except (asyncio.CancelledError, GeneratorExit):
        # The client has disconnected.
        events.disconnected = True
        raise
    finally:
        _end(response, events, watcher, log_fields)


def _end(
    response: ResponseBuilder, events: "_EventQueue", watcher: asyncio.Task[None], log_fields: dict[str, Any]
) -> None:
    """Aborts what is unfinished and fills in the log line, for every outcome of a call."""
    watcher.cancel()
    events.abort()
    log_fields.update(response.log_fields)
    if events.disconnected:
        log_fields["status"] = CLIENT_CLOSED_REQUEST


class _EventQueue:
    """Passes the events of a call's requests from the workers' threads to the event loop."""

    def __init__(self, engine: Engine, ids: Sequence[str]):
        self._engine = engine
        self._unfinished = dict(enumerate(ids))
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.disconnected = False

    def put(self, index: int, event: Event) -> None:
        """Called from a worker's thread; ignored after the loop has closed."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))
        except RuntimeError:
            return

    async def get(self) -> tuple[int, Event]:
        """The next event, with its request's index."""
        index, event = await self._queue.get()
        if event.last:
            del self._unfinished[index]
        return index, event

    @property
    def ended(self) -> bool:
        """Whether the last event of every request has been returned."""
        return not self._unfinished

    def abort(self) -> None:
        """Aborts the unfinished requests."""
        for request_id in self._unfinished.values():
            self._engine.abort(request_id)


async def _abort_on_disconnect(http: Request, events: _EventQueue) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    events.disconnected = True
    events.abort()


def _raise_if_failed(event: Event, events: _EventQueue) -> None:
    if event.failure is None:
        return
    if events.disconnected:
        raise ApiError(CLIENT_CLOSED_REQUEST, "The client closed the request.")
    raise ApiError(503 if event.finish_reason else 500, event.failure, kind="server_error")


def _encode(tokenizer: Encoder, body: Body) -> list[list[int]]:
    try:
        if isinstance(body, CompletionBody):
            return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
        tools = body.tools if body.tools and body.tool_choice != "none" else None
        return [tokenizer.encode_chat(body.messages, tools=tools, template_kwargs=body.chat_template_kwargs)]
    except PshareError as error:
        param = "prompt" if isinstance(body, CompletionBody) else "messages"
        raise ApiError(400, str(error), param=param) from None


# --- error responses -------------------------------------------------------------------------------------------------


def _add_error_objects(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": RETRY_SECONDS} if error.status == 429 else None
        return JSONResponse(error_body(error.error), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        offered = ", ".join(_routes(app))
        known = {
            404: f"{request.url.path} does not exist on this server; use one of {offered}.",
            405: f"{request.url.path} does not support {request.method}; use one of {offered}.",
        }
        body = error_body(ApiError(error.status_code, known.get(error.status_code, str(error.detail))).error)
        return JSONResponse(body, error.status_code, error.headers)


def _routes(app: FastAPI) -> list[str]:
    return [
        f"{method} {route.path}"
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    ]


def _model_card(name: str, created: int, max_len: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "pshare_jax", "max_model_len": max_len}
