"""Reads and checks a request's body within its limits; used by all handlers that take one."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from pshare_jax.server.openai.schema import ApiError, Fields, parse_body

T = TypeVar("T")
B = TypeVar("B", bound=Fields)
LONG_BODY = 16 * 1024


async def read_body(http: Request, kind: type[B], max_bytes: int) -> tuple[B, int]:
    """The checked body and its size in bytes.

    Raises:
        ApiError: 415 for another content type than JSON, 413 for more than `max_bytes`, 400 for what is no such body.
    """
    sent = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent != "application/json":
        raise ApiError(415, f"Send the body as Content-Type: application/json, not {sent or 'nothing'}.")
    too_long = ApiError(413, f"The request body is larger than {max_bytes} bytes, which is the limit of this server.")
    if int(http.headers.get("content-length", "0")) > max_bytes:
        raise too_long
    raw = bytearray()
    async for part in http.stream():
        raw += part
        if len(raw) > max_bytes:
            raise too_long
    return await maybe_threaded(len(raw), lambda: parse_body(kind, bytes(raw))), len(raw)


async def maybe_threaded(size: int, work: Callable[[], T]) -> T:
    """Runs short work at once and long work in a thread, so that it does not hold up other clients."""
    return await asyncio.to_thread(work) if size > LONG_BODY else work()
