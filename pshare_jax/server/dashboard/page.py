"""The live page at `/` and its data at `/live`.

The page is one document built from static/. It contains no data (so it needs no API key, and asks for it) and loads no
other resource, which its Content-Security-Policy enforces.
"""

import base64
import hashlib
from importlib import resources

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse

from pshare_jax.server.dashboard.stats import DashboardStats

SCRIPTS = ("show.js", "charts.js", "board.js", "chat.js", "main.js")


def add_live_page(app: FastAPI, stats: DashboardStats) -> None:
    """Adds both routes to the application."""
    page, policy = make_page()
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    @app.get("/", include_in_schema=False)
    async def live_page() -> Response:
        return HTMLResponse(page, headers=headers)

    # Not async: FastAPI then takes the snapshot in a thread, off the event loop.
    @app.get("/live")
    def live_data() -> Response:
        return JSONResponse(stats.snapshot(), headers={"Cache-Control": "no-store"})


def make_page() -> tuple[str, str]:
    """The HTML document and its Content-Security-Policy, which allows only its style, its script and this server."""
    style, script = _read("live.css"), "".join(_read(name) for name in SCRIPTS)
    page = _read("live.html").replace("/* style */", style).replace("/* script */", script)
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def _read(name: str) -> str:
    return (resources.files("pshare_jax.server.dashboard") / "static" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
