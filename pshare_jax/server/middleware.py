"""ASGI middleware: request ids, origins, the API key, the request log, and an error object for unexpected exceptions."""

import hmac
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pshare_jax.engine.request import FAILED
from pshare_jax.server.errors import OnRefusal, error_response, reason_of
from pshare_jax.server.openai.schema import ApiError
from pshare_jax.server.origins import Origins, is_preflight, preflight_headers
from pshare_jax.server.probes import PATHS as PROBES

logger = logging.getLogger(__name__)
request_log = logging.getLogger("pshare_jax.requests")
OPEN_PATHS = (*PROBES, "/")
"""Paths without a key: probes have none, and the live page contains no data and asks for it."""
CLIENT_CLOSED_REQUEST = 499
"""The logged status if the client disconnected before the end of the response (nginx's code)."""


class Middleware:
    """Adds x-request-id to every response: the client's own if it is printable ASCII, else a new id."""

    def __init__(self, app: ASGIApp, api_key: str | None, origins: Origins, on_refusal: OnRefusal):
        self._app, self._api_key = app, api_key
        self._origins, self._on_refusal = origins, on_refusal

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
        more_headers = [(b"x-request-id", request_id), *self._origins.response_headers(headers)]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *more_headers]
            await send(message)

        try:
            answer = self._own_answer(scope, headers) or self._app
            await answer(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except Exception:
            logger.exception("request %s failed", request_id.decode())
            if not status:
                await self._refused(ApiError(500, FAILED, kind="server_error"))(scope, receive, send_with_id)
        finally:
            _log(scope, request_id.decode(), status, time.monotonic() - began, log_fields)

    def _own_answer(self, scope: Scope, headers: dict[bytes, bytes]) -> ASGIApp | None:
        """The answer to a request that must not reach the application."""
        # A preflight has no key; the request that follows it needs one.
        preflight = is_preflight(scope["method"], headers)
        if (preflight or scope["method"] == "POST") and not self._origins.allows(headers):
            return self._refused(ApiError(403, self._origins.refusal(headers), kind="permission_error"))
        if preflight:
            response = Response(status_code=204)
            response.raw_headers += preflight_headers(headers)
            return response
        return None if self._allowed(scope["path"], headers) else self._refused(_key_error())

    def _refused(self, error: ApiError) -> ASGIApp:
        self._on_refusal(error.status, reason_of(error.error))
        return error_response(error, {"WWW-Authenticate": "Bearer"} if error.status == 401 else None)

    def _allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._api_key is None or path in OPEN_PATHS:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # The key is compared in constant time and before the scheme, so the response time reveals nothing about it.
        return hmac.compare_digest(key.strip(), self._api_key.encode()) and scheme.lower() == b"bearer"


def _key_error() -> ApiError:
    message = "The API key is missing or wrong; send it in the header Authorization: Bearer KEY."
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key")


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
