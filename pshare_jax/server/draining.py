"""uvicorn's server: a callback once it serves, a shutdown that drains running requests, and a stop of a broken engine."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn

from pshare_jax.engine.engine import Engine


class DrainingServer(uvicorn.Server):
    """On shutdown it refuses new requests, and aborts the requests that still run after `drain_seconds`."""

    def __init__(self, config: uvicorn.Config, engine: Engine, on_ready: Callable[[], None], drain_seconds: float):
        super().__init__(config)
        self._engine, self._on_ready, self._drain_seconds = engine, on_ready, drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once."""
        await super().startup(sockets)
        self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: a server that can no longer serve a task stops, to be restarted."""
        # Never written back as it was read: a signal may set it in between.
        if self._engine.broken:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn on a signal; it then waits for open responses (a second Ctrl-C ends them at once)."""
        self._engine.stop_accepting()
        draining = asyncio.create_task(self._abort_after_draining())
        try:
            await super().shutdown(sockets)
        finally:
            draining.cancel()

    async def _abort_after_draining(self) -> None:
        await asyncio.sleep(self._drain_seconds)
        self._engine.abort_all()
