"""ASGI middleware: request ids, the API key, the request log, and an error object for unexpected exceptions."""

import hmac
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pshare_jax.engine.request import FAILED
from pshare_jax.server.openai.schema import ApiError, error_body

logger = logging.getLogger(__name__)
request_log = logging.getLogger("pshare_jax.requests")
OPEN_PATHS = ("/health", "/")
"""Paths without a key: health checks have none, and the live page contains no data and asks for it."""
CLIENT_CLOSED_REQUEST = 499
"""The logged status if the client disconnected before the end of the response (nginx's code)."""


class Middleware:
    """Adds x-request-id to every response: the client's own if it is printable ASCII, else a new id."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app, self._api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request. Handlers may add fields for its log line to `scope["state"]["log_fields"]`."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"")
        request_id = sent if re.fullmatch(rb"[!-~]{1,128}", sent) else uuid.uuid4().hex.encode()
        log_fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log_fields"] = log_fields
        began, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        try:
            if _is_cross_origin(scope["method"], headers):
                await _cross_origin_error()(scope, receive, send_with_id)
            elif self._allowed(scope["path"], headers):
                await self._app(scope, receive, send_with_id)
            else:
                await _key_error()(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception:
            logger.exception("request %s failed", request_id.decode())
            if not status:
                error = ApiError(500, FAILED, kind="server_error").error
                await JSONResponse(error_body(error), 500)(scope, receive, send_with_id)
        finally:
            _log(scope, request_id.decode(), status, time.monotonic() - began, log_fields)

    def _allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._api_key is None or path in OPEN_PATHS:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # The key is compared in constant time and before the scheme, so the response time reveals nothing about it.
        return hmac.compare_digest(key.strip(), self._api_key.encode()) and scheme.lower() == b"bearer"


def _is_cross_origin(method: str, headers: dict[bytes, bytes]) -> bool:
    """Whether another site's page in a browser sends this; it could otherwise use a server on its visitor's machine."""
    origin = headers.get(b"origin")
    return method == "POST" and origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


def _cross_origin_error() -> JSONResponse:
    message = "Cross-origin requests are not allowed; call this server from its own page or from outside a browser."
    error = ApiError(403, message, kind="permission_error")
    return JSONResponse(error_body(error.error), 403)


def _key_error() -> JSONResponse:
    message = "The API key is missing or wrong; send it in the header Authorization: Bearer KEY."
    error = ApiError(401, message, kind="authentication_error", code="invalid_api_key")
    return JSONResponse(error_body(error.error), 401, {"WWW-Authenticate": "Bearer"})


def _log(scope: Scope, request_id: str, status: int, seconds: float, log_fields: dict[str, Any]) -> None:
    # Polling would fill the log.
    if scope["method"] == "GET" and status == 200:
        return
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 4),
        **log_fields,
    }
    request_log.info(json.dumps(line, ensure_ascii=False))
