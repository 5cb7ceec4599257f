"""The command line of the server: `pshare-serve --config FILE [a.b=c ...]`, also behind serve/main.py.

It prints the resolved config and its progress, binds the address before loading anything, and serves until Ctrl-C or
SIGTERM. After a user's mistake it prints one sentence and exits with status 2.
"""

import argparse
import asyncio
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvicorn

from pshare_jax.engine.engine import Engine
from pshare_jax.errors import PshareError
from pshare_jax.server.app import make_app
from pshare_jax.server.config import ServeConfig, ServerConfig, check_config
from pshare_jax.server.draining import DrainingServer
from pshare_jax.settings import load_settings, to_yaml

GRACE_SECONDS = 5
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep idle connections (httpx: 5 s), or a client could send on a connection that is being closed."""


class EngineBroken(Exception):
    """All workers of a task are dead."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the server; returns the exit status: 0 after a requested stop, 1 if a task could no longer be served, 2 after a
    user's mistake.
    """
    options = _parser().parse_intermixed_args(arguments)
    try:
        config = load_settings(ServeConfig, options.config, options.overrides)
        check_config(config)
        print(to_yaml(_without_key(config)), end="", flush=True)
        if not options.print_config:
            _serve(config, options.warmup == "full")
    except PshareError as error:
        print(f"pshare-serve: {error}", file=sys.stderr)
        return 2
    except EngineBroken as error:
        print(f"pshare-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return 0


def _without_key(config: ServeConfig) -> ServeConfig:
    """The config with its API key hidden."""
    if config.server.api_key is None:
        return config
    return replace(config, server=replace(config.server, api_key="(hidden)"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pshare-serve", description="Serve many tasks over one shared prefill.")
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, such as configs/serve/smollm2.yaml")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument(
        "--warmup",
        choices=("small", "full"),
        default="small",
        help="small (default): start answering once the programs for a short chat are compiled, and compile the rest in "
        "the background; full: compile everything first",
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config values, such as server.port=8001")
    return parser


def _serve(config: ServeConfig, full_warmup: bool) -> None:
    # Imported here: they import JAX, which neither --print-config nor a refused config needs.
    from pshare_jax.compilation_cache import cache_folder
    from pshare_jax.server import startup

    started = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {line}", flush=True)

    listener = bind(config.server)
    # systemd and docker stop with SIGTERM; it acts like Ctrl-C, also while weights are loading.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with listener:
        if config.server.log_requests:
            _log_requests()
        startup.prepare_jax(config, cache_folder())
        served, programs = startup.build(config, report)
        served.engine.start()
        compiler = None
        try:
            compiler = startup.warm_up(served, programs, full_warmup, report)
            port = listener.getsockname()[1]
            host = f"[{config.server.host}]" if ":" in config.server.host else config.server.host

            def report_ready() -> None:
                print(f"ready in {time.monotonic() - started:.1f} s: http://{host}:{port}", flush=True)

            _listen(listener, config.server)
            settings = uvicorn.Config(
                make_app(served),
                log_level="warning",
                access_log=False,
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(config.server.drain_seconds) + GRACE_SECONDS,
            )
            server = DrainingServer(settings, served.engine, report_ready, config.server.drain_seconds)
            run(server, listener, served.engine)
        finally:
            served.engine.stop()
            if compiler is not None:
                compiler.stop()
            if served.task_table is not None:
                served.task_table.stop()


def run(server: DrainingServer, listener: socket.socket, engine: Engine) -> None:
    """Serves until a stop is requested.

    Raises:
        EngineBroken: all workers of a task are dead.
    """
    asyncio.run(server.serve([listener]))
    if engine.broken:
        raise EngineBroken("All workers of a task have failed (the log above says why); start the server again.")


def _log_requests() -> None:
    log = logging.getLogger("pshare_jax.requests")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    log.propagate = False


def bind(server: ServerConfig) -> socket.socket:
    """A socket bound to the config's address.

    Raises:
        PshareError: the address is in use, not on this machine, or needs more privileges.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise PshareError(f"server.host {server.host!r} is not an address of this machine; try 127.0.0.1.") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(server, error) from None
    return listener


def _listen(listener: socket.socket, server: ServerConfig) -> None:
    """Opens the bound socket to clients; until then it refuses connections."""
    try:
        listener.listen(2048)
    except OSError as error:
        raise _cannot_listen(server, error) from None


def _cannot_listen(server: ServerConfig, error: OSError) -> PshareError:
    reason = (error.strerror or str(error)).lower()
    hint = "choose another port with server.port=8001, or any free port with server.port=0"
    return PshareError(f"Cannot listen on {server.host}:{server.port}: {reason}; {hint}.")
