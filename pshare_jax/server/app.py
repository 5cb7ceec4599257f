"""The HTTP face: OpenAI's endpoints over the engine, with OpenAI's error object for everything that is wrong.

`make_app` is called by the command line and by tests. A handler reads and checks the body, tokenises, submits
to the engine and turns its events into one answer or a stream. If the client hangs up, the request is aborted.
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
from pshare_jax.server.dashboard.stats import Live
from pshare_jax.server.metrics import Metrics
from pshare_jax.server.middleware import HUNG_UP, Middleware
from pshare_jax.server.openai.bodies import maybe_threaded, read_body
from pshare_jax.server.openai.responses import Answer
from pshare_jax.server.openai.schema import (
    ApiError,
    Body,
    ChatBody,
    CompletionBody,
    body_schema,
    check_model,
    error_body,
    unknown_model,
)
from pshare_jax.server.openai.to_requests import Limits, check_num_answers, make_requests
from pshare_jax.server.openai.tokenize import add_token_routes
from pshare_jax.server.tasks.api import add_task_routes
from pshare_jax.server.tasks.table import TaskTable
from pshare_jax.text.encoder import Encoder

RETRY_SECONDS = "1"
SESSION_HEADERS = ("x-session-id", "x-openwebui-chat-id")
"""Headers in which clients name a growing context; the fields prompt_cache_key and user come after them."""


@dataclass(frozen=True)
class Served:
    """What the api answers for: the engine, the task names in order, the model's tokenizer and limits, and the base's name.

    With a `task_table` clients may change the tasks; `tasks` is then the list that it keeps.
    """

    engine: Engine
    tasks: list[str]
    tokenizer: Encoder
    limits: Limits
    max_body_bytes: int = 8 * 1024 * 1024
    api_key: str | None = None
    base: str = ""
    task_table: TaskTable | None = None


def make_app(served: Served) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="pshare_jax", docs_url=None, redoc_url=None)
    created = int(time.time())
    # A schema that is read once must not name what changes.
    named = served.tasks if served.task_table is None else []

    def card(name: str) -> dict[str, Any]:
        return _card(name, created, served.limits.max_len)

    @app.get("/health")
    async def health() -> Response:
        healthy = served.engine.healthy
        return JSONResponse({"status": "ok" if healthy else "unhealthy"}, 200 if healthy else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in served.tasks]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, served.tasks)
        return card(name)

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody, named))
    async def chat(request: Request) -> Response:
        return await _answer(served, request, ChatBody)

    @app.post("/v1/completions", openapi_extra=body_schema(CompletionBody, named))
    async def completions(request: Request) -> Response:
        return await _answer(served, request, CompletionBody)

    metrics = Metrics(served.engine)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/flush_cache")
    async def flush_cache() -> dict[str, Any]:
        return {"flushed_pages": served.engine.flush_cache()}

    add_token_routes(app, served.tokenizer, served.limits, served.max_body_bytes)
    add_live_page(app, Live(served.engine, served.tasks, served.base))
    if served.task_table is not None:
        add_task_routes(app, served.task_table, served.max_body_bytes)
    app.add_middleware(Middleware, api_key=served.api_key)
    _add_error_objects(app)
    return app


# --- one request -----------------------------------------------------------------------------------------------------


async def _answer(served: Served, http: Request, kind: type[ChatBody] | type[CompletionBody]) -> Response:
    body, size = await read_body(http, kind, served.max_body_bytes)
    check_model(body.model, served.tasks)
    check_num_answers(body, served.limits)
    prompts = await maybe_threaded(size, lambda: _encode(served.tokenizer, body))
    session = next((value for name in SESSION_HEADERS if (value := http.headers.get(name))), None)
    request_id = uuid.uuid4().hex
    requests = make_requests(body, request_id, prompts, served.limits, session)
    events = _Events(served.engine, [request.id for request in requests])
    _submit(served, requests, events)
    answer = Answer(body, request_id, requests, served.tokenizer)
    watcher = asyncio.create_task(_abort_on_disconnect(http, events))
    streams = False
    try:
        index, event = await events.get()
        _raise_if_failed(event, events)
        if body.stream:
            streams = True
            lines = _stream(answer, index, event, events, watcher, http.state.log_fields)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        answer.add(index, event)
        while not events.ended:
            index, event = await events.get()
            _raise_if_failed(event, events)
            answer.add(index, event)
        return await maybe_threaded(answer.size, lambda: JSONResponse(answer.whole()))
    finally:
        if not streams:
            _end(answer, events, watcher, http.state.log_fields)


def _submit(served: Served, requests: Sequence[Choice], events: "_Events") -> None:
    """All requests of a call, or none."""
    try:
        served.engine.submit_all(requests, [functools.partial(events.put, index) for index in range(len(requests))])
    except EngineFull:
        message = "The server has as many requests as it may hold; try again soon."
        raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded") from None
    except UnknownTask:
        # It was there when the body was read.
        raise unknown_model(requests[0].task, served.tasks) from None
    except EngineDown:
        raise ApiError(503, "The server is stopping or a worker has died.", kind="server_error") from None


async def _stream(
    answer: Answer,
    index: int,
    event: Event,
    events: "_Events",
    watcher: asyncio.Task[None],
    told: dict[str, Any],
) -> AsyncIterator[str]:
    try:
        for line in answer.start():
            yield line
        while True:
            size = answer.size_of(event)
            for line in await maybe_threaded(size, functools.partial(answer.lines, index, event)):
                yield line
            if events.ended or event.failure is not None:
                break
            index, event = await events.get()
        for line in answer.end():
            yield line
    except (asyncio.CancelledError, GeneratorExit):
        # Nobody reads on.
        events.hung_up = True
        raise
    finally:
        _end(answer, events, watcher, told)


def _end(answer: Answer, events: "_Events", watcher: asyncio.Task[None], told: dict[str, Any]) -> None:
    """However a call ends: nothing of it goes on, and the log tells what came of it."""
    watcher.cancel()
    events.abort()
    told.update(answer.told)
    if events.hung_up:
        told["status"] = HUNG_UP


class _Events:
    """The events of a call's requests, carried from workers' threads to the event loop."""

    def __init__(self, engine: Engine, ids: Sequence[str]):
        self._engine = engine
        self._live = dict(enumerate(ids))
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.hung_up = False

    def put(self, index: int, event: Event) -> None:
        """Called from a worker's thread; after the loop has closed there is nobody to tell."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))
        except RuntimeError:
            return

    async def get(self) -> tuple[int, Event]:
        """The next event, and which request's it is."""
        index, event = await self._queue.get()
        if event.last:
            del self._live[index]
        return index, event

    @property
    def ended(self) -> bool:
        """Whether the last event of every request was got."""
        return not self._live

    def abort(self) -> None:
        """Ends the requests that still live in the engine."""
        for request_id in self._live.values():
            self._engine.abort(request_id)


async def _abort_on_disconnect(http: Request, events: _Events) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    events.hung_up = True
    events.abort()


def _raise_if_failed(event: Event, events: _Events) -> None:
    if event.failure is None:
        return
    if events.hung_up:
        raise ApiError(HUNG_UP, "The client hung up.")
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


# --- around every request --------------------------------------------------------------------------------------------


def _add_error_objects(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": RETRY_SECONDS} if error.status == 429 else None
        return JSONResponse(error_body(error.error), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        offered = ", ".join(_routes(app))
        known = {
            404: f"There is no {request.url.path} on this server; it has {offered}.",
            405: f"{request.url.path} does not take {request.method}; this server has {offered}.",
        }
        shown = ApiError(error.status_code, known.get(error.status_code, str(error.detail)))
        return JSONResponse(error_body(shown.error), error.status_code, error.headers)


def _routes(app: FastAPI) -> list[str]:
    return [
        f"{method} {route.path}"
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    ]


def _card(name: str, created: int, max_len: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "pshare_jax", "max_model_len": max_len}
