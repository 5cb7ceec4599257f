"""A local stand-in for the Hugging Face hub: the few endpoints that its library asks for a data set's files.

`FakeHub` serves repositories of data sets: name -> revision -> path -> content. No test asks the real hub.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]
Repositories = dict[str, dict[str, dict[str, bytes]]]


class FakeHub:
    """Serves on a free port until it is closed. `gated` data sets can be listed, but their files need the token.

    `paths` are those that were asked for.
    """

    def __init__(self, repositories: Repositories, gated: frozenset[str] = frozenset(), token: str = "t0k"):
        self.repositories, self.gated, self.token = repositories, gated, token
        self.paths: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit(self, name: str, revision: str) -> str | None:
        """The commit of a revision, which may be that commit."""
        commits = {self._commit(name, known): known for known in self.repositories[name]}
        return revision if revision in commits else next((c for c, known in commits.items() if known == revision), None)

    def files(self, name: str, commit: str) -> dict[str, bytes]:
        return next(files for known, files in self.repositories[name].items() if self._commit(name, known) == commit)

    def _commit(self, name: str, revision: str) -> str:
        files = sorted(self.repositories[name][revision].items())
        return hashlib.sha1(repr((name, revision, files)).encode()).hexdigest()


def run_on_hub(hub: FakeHub, home: Path, code: str, *arguments: str, **environment: str) -> list:
    """What Python code with these arguments prints, JSON by lines, in a process that knows no other hub."""
    settings = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        if name not in environment:
            settings.pop(name, None)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=100, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.paths.append(path)
        parts = [unquote(part) for part in path.strip("/").split("/")]
        file: list[str] = []
        if parts[:2] == ["api", "datasets"]:
            _, _, org, name, what, revision = parts
        elif parts[0] == "datasets":
            _, org, name, what, revision, *file = parts
        else:
            return self._send(404, b"{}", {})
        name = f"{org}/{name}"
        if name not in self.hub.repositories:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.commit(name, revision)
        if commit is None:
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.hub.files(name, commit)
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), {})
        if what == "tree":
            listed = [{"type": "file", "path": path, "size": len(x), "oid": _etag(x)} for path, x in files.items()]
            return self._send(200, json.dumps(listed).encode(), {})
        if name in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        content = files["/".join(file)]
        return self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{_etag(content)}"'})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
