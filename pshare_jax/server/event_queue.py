"""Passes the events of a call's requests from the workers' threads to the event loop."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from pshare_jax.engine.engine import Engine
from pshare_jax.engine.handle import Handle
from pshare_jax.engine.request import Event, Request


class Mailbox:
    """Takes events to the queues of an event loop, and wakes the loop once for all that arrive before it runs: a decode step
    has an event for each of its rows.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self._events: deque[tuple[asyncio.Queue[tuple[int, Event]], tuple[int, Event]]] = deque()
        self._called = False

    def put(self, queue: "asyncio.Queue[tuple[int, Event]]", event: tuple[int, Event]) -> None:
        """Called from any thread; ignored after the loop has closed."""
        self._events.append((queue, event))
        # In this order, and `_deliver` in its own: an event is delivered by a call that is yet to come, or calls itself.
        if self._called:
            return
        self._called = True
        try:
            self.loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            return

    def _deliver(self) -> None:
        self._called = False
        while self._events:
            queue, event = self._events.popleft()
            queue.put_nowait(event)


class EventQueue:
    """The requests of one call, from their submission to their end."""

    def __init__(self, engine: Engine, requests: Sequence[Request], mailbox: Mailbox):
        self._engine, self._requests = engine, requests
        self._unfinished = {index: request.id for index, request in enumerate(requests)}
        self._handles: list[Handle] = []
        self._mailbox = mailbox
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._aborted = False
        self.disconnected = False

    def submit(self) -> None:
        """Submits all requests, or none; raises what `Engine.submit` raises. May run in another thread."""
        takers: list[Callable[[Event], None] | None] = [partial(self.put, index) for index in self._unfinished]
        self._handles = self._engine.submit_all(self._requests, takers)
        if self._aborted:
            # The call has ended while this thread submitted.
            self.abort()

    def put(self, index: int, event: Event) -> None:
        """Called from a worker's thread; ignored after the loop has closed."""
        self._mailbox.put(self._queue, (index, event))

    async def get(self, seconds: float | None = None) -> tuple[int, Event] | None:
        """The next event, with its request's index; None if there is none within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                index, event = await self._queue.get()
        except TimeoutError:
            return None
        if event.last:
            del self._unfinished[index]
        return index, event

    @property
    def admitted(self) -> bool:
        """Whether any request has left the engine's queue."""
        return any(handle.admitted for handle in self._handles)

    @property
    def ended(self) -> bool:
        """Whether the last event of every request has been returned."""
        return not self._unfinished

    def abort(self) -> None:
        """Aborts the unfinished requests."""
        self._aborted = True
        for request_id in list(self._unfinished.values()):
            self._engine.abort(request_id)
