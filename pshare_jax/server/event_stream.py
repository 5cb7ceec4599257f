"""The streamed response of a call: server-sent events, and comment lines while none is available."""

import time
from collections.abc import AsyncIterator, Iterable
from typing import Any, Protocol, runtime_checkable

from fastapi import Response
from starlette.types import Receive, Scope, Send

from pshare_jax.engine.request import Event
from pshare_jax.server.event_queue import EventQueue
from pshare_jax.server.openai.bodies import maybe_threaded

HEARTBEAT_SECONDS = 15.0
"""The longest time without a line once the response has begun. Proxies close connections that are silent for 60 s."""
POLL_SECONDS = 1.0
"""How often a late call looks whether it was admitted."""
WAITING = ": waiting\n\n"
"""A comment, which readers of server-sent events ignore."""


@runtime_checkable
class CallResponse(Protocol):
    """A call's response, built from the engine's events of its requests, whole or as the lines of a stream."""

    def add(self, index: int, event: Event) -> None:
        """Adds an event of request `index` to the whole response."""
        ...

    def full(self) -> dict[str, Any]:
        """The whole response, after all events were added."""
        ...

    @property
    def size(self) -> int:
        """The approximate size of the whole response in bytes."""
        ...

    def start(self) -> Iterable[str]:
        """The first lines of a stream."""
        ...

    def lines(self, index: int, event: Event) -> Iterable[str]:
        """An event of request `index` as stream lines."""
        ...

    def size_of(self, event: Event) -> int:
        """The approximate size of an event's lines in bytes, of the first lines too if they come with it."""
        ...

    def end(self) -> Iterable[str]:
        """The last lines of a stream."""
        ...

    @property
    def log_fields(self) -> dict[str, Any]:
        """The call's fields in the request log."""
        ...


async def first_event(events: EventQueue) -> tuple[int, Event] | None:
    """The first event of a streamed call; None if the response must begin without it: the call was admitted and is
    `HEARTBEAT_SECONDS` old. A call in the queue waits on, since it may still become an error response.
    """
    began = time.monotonic()
    seconds = HEARTBEAT_SECONDS
    while (found := await events.get(seconds)) is None:
        if events.admitted and time.monotonic() - began >= HEARTBEAT_SECONDS:
            return None
        seconds = min(POLL_SECONDS, HEARTBEAT_SECONDS)
    return found


class EventStream(Response):
    """Sends the events of a call, from `first` on. `end` must be called by the application after every outcome."""

    media_type = "text/event-stream"

    def __init__(self, response: CallResponse, first: tuple[int, Event] | None, events: EventQueue):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._response, self._first, self._events = response, first, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the head and then every line as soon as it is known."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines():
            await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[str]:
        found, begun, last = self._first, False, time.monotonic()
        while True:
            lines = [WAITING] if found is None else await self._event_lines(*found, begun)
            begun = begun or found is not None
            for line in lines:
                yield line
                last = time.monotonic()
            if found is not None and (self._events.ended or found[1].failure is not None):
                break
            # Not every event has a line: its text may still become a stop string.
            found = await self._events.get(last + HEARTBEAT_SECONDS - time.monotonic())
        for line in self._response.end():
            yield line

    async def _event_lines(self, index: int, event: Event, begun: bool) -> list[str]:
        def work() -> list[str]:
            start = () if begun else self._response.start()
            return [*start, *self._response.lines(index, event)]

        return await maybe_threaded(self._response.size_of(event), work)
