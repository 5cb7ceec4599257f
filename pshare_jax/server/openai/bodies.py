"""Reads and checks the JSON body of a request; used by every handler with a body."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from pshare_jax.server.openai.schema import ApiError, RequestBody, parse_body

T = TypeVar("T")
B = TypeVar("B", bound=RequestBody)
LONG_BODY = 16 * 1024


async def read_body(http: Request, kind: type[B], max_bytes: int) -> tuple[B, int]:
    """The checked body and its size in bytes.

    Raises:
        ApiError: 415 for a content type other than JSON, 413 for more than `max_bytes`, 400 for an invalid body.
    """
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"The Content-Type must be application/json, not {content_type or 'empty'}.")
    too_long = ApiError(413, f"The request body exceeds this server's limit of {max_bytes} bytes; shorten it.")
    if int(http.headers.get("content-length", "0")) > max_bytes:
        raise too_long
    raw = bytearray()
    async for part in http.stream():
        raw += part
        if len(raw) > max_bytes:
            raise too_long
    return await maybe_threaded(len(raw), lambda: parse_body(kind, bytes(raw))), len(raw)


async def maybe_threaded(size: int, work: Callable[[], T]) -> T:
    """Runs short work directly and long work in a thread, so that it does not block the event loop."""
    return await asyncio.to_thread(work) if size > LONG_BODY else work()
