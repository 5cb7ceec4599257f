"""Which web pages may call the server: its own, and those of `server.allowed_origins` (CORS).

The middleware is the caller. A browser names the page's site in the header Origin; programs outside browsers send none.
X-Forwarded-Host is not trusted, since any client can send it.
"""

import re
from collections.abc import Mapping, Sequence

ANY = "*"
DEFAULT_PORTS = {"http": "80", "https": "443"}
_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^/:@?#\s]+)(?::(\d+))?", re.IGNORECASE)
_MAX_AGE_SECONDS = b"600"

Headers = list[tuple[bytes, bytes]]


def is_origin(text: str) -> bool:
    """Whether `text` may stand in `server.allowed_origins`: scheme://host, scheme://host:port, null or *."""
    return text in (ANY, "null") or _ORIGIN.fullmatch(text) is not None


class Origins:
    """The allowed origins, all names in lower case, and ports as numbers even where they are the default."""

    def __init__(self, allowed: Sequence[str]):
        self._allowed = frozenset(map(_normalised, allowed))

    def allows(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request may change something: no browser's page sends it, or an allowed page."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        return not origin or self._lists(origin) or _is_same(origin, headers.get(b"host", b"").decode("latin-1"))

    def response_headers(self, headers: Mapping[bytes, bytes]) -> Headers:
        """With these a page of another, allowed origin may read the response."""
        if not self._allowed:
            return []
        origin = headers.get(b"origin")
        if origin is None or not self._lists(origin.decode("latin-1")):
            return [(b"vary", b"Origin")]
        return [
            (b"vary", b"Origin"),
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
        ]

    def refusal(self, headers: Mapping[bytes, bytes]) -> str:
        """Why a page may not call the server, and what to do."""
        origin, host = (headers.get(name, b"").decode("latin-1")[:200] for name in (b"origin", b"host"))
        return (
            f"The page's origin {origin!r} is neither this server's own address (its Host header is {host!r}) nor in "
            "server.allowed_origins; add it there."
        )

    def _lists(self, origin: str) -> bool:
        return ANY in self._allowed or _normalised(origin) in self._allowed


def is_preflight(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser asks whether a page may send a request."""
    return method == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers


def preflight_headers(headers: Mapping[bytes, bytes]) -> Headers:
    """Allows the method and headers that were asked for; the request itself is checked when it comes."""
    asked = [(b"access-control-allow-methods", headers[b"access-control-request-method"])]
    if b"access-control-request-headers" in headers:
        asked.append((b"access-control-allow-headers", headers[b"access-control-request-headers"]))
    return [*asked, (b"access-control-max-age", _MAX_AGE_SECONDS)]


def _normalised(origin: str) -> str:
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        return origin
    scheme, host, port = found.groups()
    return f"{scheme}://{host}:{port or DEFAULT_PORTS.get(scheme.lower(), '')}".lower()


def _is_same(origin: str, host: str) -> bool:
    scheme = origin.partition("://")[0]
    return (
        bool(host)
        and _ORIGIN.fullmatch(origin) is not None
        and _normalised(f"{scheme}://{host}") == _normalised(origin)
    )
