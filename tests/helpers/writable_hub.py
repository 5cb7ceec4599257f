"""A fake of the Hugging Face hub on this machine for writing: the few requests by which a folder becomes a model, kept in memory.

It is no measure of the real hub; the requests are those of the real client, `huggingface_hub`.
"""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens that may write to all models, and to none."""


class FakeHub:
    """Models by name: whether they are private, and their files."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        self.address = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request."""
        path = path.partition("?")[0]
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if token not in (WRITER, READER):
            return 401, {"error": "Invalid username or password."}
        if token == READER and method == "POST":
            return 403, {"error": "Forbidden: you don't have the right."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        org, name, *action = path.removeprefix("/api/models/").split("/")
        if f"{org}/{name}" not in self.models:
            return 404, {"error": "Repository not found"}
        model = self.models[f"{org}/{name}"]
        match action:
            case ["preupload", "main"]:
                files = [{**file, "uploadMode": "regular"} for file in json.loads(body)["files"]]
                return 200, {"files": [{"shouldIgnore": False, "oid": None, **file} for file in files]}
            case ["commit", "main"]:
                return self._commit(f"{org}/{name}", model, body)
            case _:
                siblings = [{"rfilename": file} for file in model["files"]]
                return 200, {"id": f"{org}/{name}", "private": model["private"], "siblings": siblings, "sha": "0" * 40}

    def _create(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        known = name in self.models
        private = bool(body.get("private")) or body.get("visibility") == "private"
        self.models.setdefault(name, {"private": private, "files": {}})
        return (409 if known else 200), {"url": f"{self.address}/{name}", "name": name, "id": name}

    def _commit(self, name: str, model: dict[str, Any], body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                model["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}


@contextmanager
def fake_hub():
    """A running fake hub; HF_ENDPOINT is its `address`."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self._body()
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, content = hub.answer(self.command, self.path, token, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        do_GET = do_POST = do_HEAD = _reply

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
