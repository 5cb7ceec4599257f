"""GET /health, /ready and /version; and the end of a server that can no longer serve a task."""

import asyncio
import socket
import threading
import time
from importlib.metadata import version

import pytest
import uvicorn
from fake_engine import make_engine
from fake_server import PATHS, serving

from pshare_jax.engine.engine import Engine
from pshare_jax.server import cli
from pshare_jax.server.draining import DrainingServer

pytestmark = pytest.mark.host


def test_version():
    with serving() as server:
        assert server.client.get("/version").json() == {"version": version("pshare_jax")}


def test_ready_once_everything_is_compiled():
    with serving() as server:
        assert server.client.get("/ready").json() == {"status": "ready"}
        shapes = server.engine.decode_workers[0].compiled
        shapes.limit([(1,)])
        refusal = server.client.get("/ready")
        assert refusal.status_code == 503
        assert "compiled" in refusal.json()["reason"]
        assert server.client.get("/health").status_code == 200
        shapes.settle()
        assert server.client.get("/ready").status_code == 200


def test_not_ready_while_stopping_or_failing(monkeypatch):
    with serving() as server:
        monkeypatch.setattr(Engine, "healthy", False)
        assert "worker" in server.client.get("/ready").json()["reason"]
        monkeypatch.undo()
        server.engine.stop_accepting()
        refusal = server.client.get("/ready")
        assert (refusal.status_code, "stopping" in refusal.json()["reason"]) == (503, True)


def test_a_broken_engine_stops_the_server(monkeypatch):
    with serving(drain_seconds=0.2) as server:
        body = {"model": "endless", "prompt": "p", "stream": True, "max_tokens": 90_000}
        with server.client.stream("POST", PATHS[0], json=body) as response:
            lines = response.iter_lines()
            next(lines)
            monkeypatch.setattr(Engine, "broken", True)
            # Requests of other tasks are drained, as after a signal.
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        limit = time.monotonic() + 5
        while server._server.started and not server._server.should_exit:
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_a_stop_within_a_tick_is_not_lost(monkeypatch):
    """A signal may arrive while the tick looks at the engine."""

    def broken(engine):
        server.should_exit = True
        return False

    monkeypatch.setattr(Engine, "broken", property(broken))
    engine = make_engine({"abc": [1]}).engine
    server = DrainingServer(uvicorn.Config(lambda *_: None, ws="none"), engine, lambda: None, 0.0)
    server.config.load()
    asyncio.run(server.on_tick(1))
    assert server.should_exit


def test_the_exit_status_of_a_broken_server(monkeypatch, capsys, tmp_path):
    """Everything but the loading: the command, uvicorn's server and an engine."""
    engine = make_engine({"abc": [1]}).engine
    server = DrainingServer(uvicorn.Config(lambda *_: None, log_level="error", ws="none"), engine, lambda: None, 0.0)

    def serve(config, full_warmup):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            threading.Timer(0.3, lambda: monkeypatch.setattr(Engine, "broken", True)).start()
            cli.run(server, listener, engine)

    monkeypatch.setattr(cli, "_serve", serve)
    file = tmp_path / "serve.yaml"
    file.write_text("{base: somewhere, tasks: {abc: base}}")
    assert cli.main(["--config", str(file)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pshare-serve: All workers of a task have failed")
    assert error.count("\n") == 1
    assert not engine.accepting
