"""The HTTP application: OpenAI's endpoints over the engine, with OpenAI's error object for every error.

`make_app` is called by the command line and by tests. completions.py answers the calls that generate.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pshare_jax.engine.engine import Engine
from pshare_jax.server.completions import Completions
from pshare_jax.server.dashboard.page import add_live_page
from pshare_jax.server.dashboard.stats import DashboardStats
from pshare_jax.server.errors import add_error_objects
from pshare_jax.server.metrics import Metrics
from pshare_jax.server.middleware import Middleware
from pshare_jax.server.openai.responses import ResponseBuilder
from pshare_jax.server.openai.schema import ChatBody, CompletionBody, body_schema, check_model
from pshare_jax.server.openai.to_requests import Limits
from pshare_jax.server.openai.tokenize import add_token_routes
from pshare_jax.server.origins import Origins
from pshare_jax.server.probes import add_probes
from pshare_jax.server.responses_api.response import ResponsesBuilder
from pshare_jax.server.responses_api.schema import ResponsesBody, not_stored
from pshare_jax.server.tasks.api import add_task_routes
from pshare_jax.server.tasks.table import TaskTable
from pshare_jax.text.chat_style import StyleOf, plain_style
from pshare_jax.text.encoder import Encoder
from pshare_jax.text.tool_format import format_value


@dataclass(frozen=True)
class AppContext:
    """What the handlers need: the engine, the tokenizer and limits, and the base's name.

    With a `task_table` clients may change the tasks. `allowed_origins` are those of other sites' pages (origins.py);
    `style_of` looks up how a task reads and writes chats.
    """

    engine: Engine
    tokenizer: Encoder
    limits: Limits
    max_body_bytes: int = 8 * 1024 * 1024
    api_key: str | None = None
    base: str = ""
    task_table: TaskTable | None = None
    allowed_origins: Sequence[str] = ()
    style_of: StyleOf = plain_style

    @property
    def tasks(self) -> list[str]:
        """The names of the served tasks, in order."""
        return self.engine.tasks


def make_app(context: AppContext) -> FastAPI:
    """The ASGI application."""
    app = FastAPI(title="pshare_jax", docs_url=None, redoc_url=None)
    metrics = Metrics(context.engine, context.base)
    add_probes(app, context.engine)
    _add_models(app, context)
    _add_completions(app, context, metrics)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post("/flush_cache")
    async def flush_cache() -> dict[str, Any]:
        return {"flushed_pages": context.engine.flush_cache()}

    add_token_routes(app, context.tokenizer, context.limits, context.max_body_bytes, context.style_of)
    add_live_page(app, DashboardStats(context.engine, context.base))
    if context.task_table is not None:
        add_task_routes(app, context.task_table, context.max_body_bytes)
    origins = Origins(context.allowed_origins)
    app.add_middleware(Middleware, api_key=context.api_key, origins=origins, on_refusal=metrics.record_refusal)
    add_error_objects(app, metrics.record_refusal)
    return app


def _add_models(app: FastAPI, context: AppContext) -> None:
    created = int(time.time())

    def card(name: str) -> dict[str, Any]:
        length = context.limits.max_len
        card = {"id": name, "object": "model", "created": created, "owned_by": "pshare_jax", "max_model_len": length}
        style = context.style_of(name)
        form = context.tokenizer.tool_format(style)
        text = {} if style.text_prompt is None else {"text_prompt": style.text_prompt}
        return {**card, "tool_format": form and format_value(form), "layout": {"system": style.system}, **text}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in context.tasks]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, context.tasks)
        return card(name)


def _add_completions(app: FastAPI, context: AppContext, metrics: Metrics) -> None:
    calls = Completions(
        context.engine,
        context.tokenizer,
        context.limits,
        context.max_body_bytes,
        metrics.record_tool_calls,
        context.style_of,
        metrics.record_unknown_hints,
    )
    # Clients read a schema once, so it must not list tasks that may change.
    fixed_tasks = context.tasks if context.task_table is None else []

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody, fixed_tasks))
    async def chat(request: Request) -> Response:
        return await calls.answer(request, ChatBody, ResponseBuilder)

    @app.post("/v1/completions", openapi_extra=body_schema(CompletionBody, fixed_tasks))
    async def completions(request: Request) -> Response:
        return await calls.answer(request, CompletionBody, ResponseBuilder)

    @app.post("/v1/responses", openapi_extra=body_schema(ResponsesBody, fixed_tasks))
    async def responses(request: Request) -> Response:
        return await calls.answer(request, ResponsesBody, ResponsesBuilder)

    @app.get("/v1/responses/{name}", include_in_schema=False)
    @app.delete("/v1/responses/{name}", include_in_schema=False)
    async def stored_response(name: str) -> Response:
        raise not_stored(name)
