"""Error responses: OpenAI's error object, headers about retries, and a count of refusals by reason."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from pshare_jax.server.openai.fields import NEUTRAL
from pshare_jax.server.openai.schema import ApiError, ChatBody, CompletionBody, error_body
from pshare_jax.server.responses_api.schema import FIELDS as RESPONSES_FIELDS

RETRY_SECONDS = {429: "1", 503: "5"}
FIELDS = {*ChatBody.model_fields, *CompletionBody.model_fields, *NEUTRAL, *RESPONSES_FIELDS}

OnRefusal = Callable[[int, str], None]
"""Called with the status and the reason of each error response."""


def error_response(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response for an error. `x-should-retry` is what OpenAI's clients go by before the status."""
    retry: dict[str, str] = {}
    if error.retry is False:
        retry = {"x-should-retry": "false"}
    elif error.retry and error.status in RETRY_SECONDS:
        retry = {"Retry-After": RETRY_SECONDS[error.status]}
    return JSONResponse(error_body(error.error), error.status, {**retry, **(headers or {})})


def reason_of(error: dict[str, Any]) -> str:
    """A label for an error from a fixed set: its code, else the field that it names, else its type."""
    if error["code"] is not None:
        return error["code"]
    return error["param"] if error["param"] in FIELDS else error["type"]


def add_error_objects(app: FastAPI, on_refusal: OnRefusal) -> None:
    """Gives the application's errors their response."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        on_refusal(error.status, reason_of(error.error))
        return error_response(error)

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
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods or ()
    ]
