"""Reads and checks the JSON body of a request; used by every handler with a body."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from pshare_jax.server.openai.encodings import DecodedTooLong, check_headers, decoded, json_text
from pshare_jax.server.openai.json_body import parse_body
from pshare_jax.server.openai.schema import ApiError, RequestBody

T = TypeVar("T")
B = TypeVar("B", bound=RequestBody)
LONG_BODY = 16 * 1024


async def read_body(http: Request, kind: type[B], max_bytes: int) -> tuple[B, int]:
    """The checked body and its size in bytes.

    Raises:
        ApiError: 415 for a content type other than JSON or an unknown encoding, 413 for more than `max_bytes`, 400 for an
            invalid body.
    """
    encoding = check_headers(http.headers.get("content-type", ""), http.headers.get("content-encoding", ""))
    too_long = ApiError(413, f"The request body exceeds this server's limit of {max_bytes} bytes; shorten it.")
    if int(http.headers.get("content-length", "0")) > max_bytes:
        raise too_long
    parts = bytearray()
    async for part in http.stream():
        parts += part
        if len(parts) > max_bytes:
            raise too_long
    raw = bytes(parts)
    if encoding:
        try:
            # In a thread whatever its size: a few bytes may decode to many.
            raw = await asyncio.to_thread(decoded, raw, encoding, max_bytes)
        except DecodedTooLong:
            raise too_long from None
    return await maybe_threaded(len(raw), lambda: parse_body(kind, json_text(raw))), len(raw)


async def maybe_threaded(size: int, work: Callable[[], T]) -> T:
    """Runs short work directly and long work in a thread, so that it does not block the event loop."""
    return await asyncio.to_thread(work) if size > LONG_BODY else work()
