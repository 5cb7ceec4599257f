"""What load balancers and orchestrators ask: GET /health, /ready and /version. None needs the API key."""

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from pshare_jax.engine.engine import Engine

PATHS = ("/health", "/ready", "/version")


def add_probes(app: FastAPI, engine: Engine) -> None:
    """Adds the routes to the application."""
    installed = version("pshare_jax")

    @app.get("/health")
    async def health() -> Response:
        healthy = engine.healthy
        return JSONResponse({"status": "ok" if healthy else "unhealthy"}, 200 if healthy else 503)

    @app.get("/ready")
    async def ready() -> Response:
        reason = why_not_ready(engine)
        if reason is not None:
            return JSONResponse({"status": "not ready", "reason": reason}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/version")
    async def server_version() -> dict[str, Any]:
        return {"version": installed}


def why_not_ready(engine: Engine) -> str | None:
    """Why the server should not get full load yet or any longer, None if it may."""
    if not engine.accepting:
        return "the server is stopping"
    if not engine.healthy:
        return "a worker has failed or makes no progress"
    if not all(worker.compiled.settled for worker in engine.workers):
        return "programs are still being compiled in the background, so large batches and long prompts are slow"
    return None
