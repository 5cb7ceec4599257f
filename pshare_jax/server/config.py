"""The serve config: the engine's config (engine/config.py), the base, and the HTTP server."""

import math
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Literal

from pshare_jax.engine.config import EngineConfig, check_engine_config, workers_of
from pshare_jax.errors import PshareError
from pshare_jax.server.origins import is_origin
from pshare_jax.settings import check_least
from pshare_jax.text.chat_style import ChatLayout, parse_style

MAX_CPU_DEVICES = 64


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP server: address (port 0 = any free port) and largest request body.

    Clients must send `api_key` (default: the environment variable PSHARE_API_KEY), if set, as a bearer token. On a stop,
    running answers have `drain_seconds` to end. `log_requests` writes a JSON line for each call to standard error.
    Pages of other sites may call the server from a browser if their origin is in `allowed_origins` (origins.py).
    `modules_dir` lets clients load, replace and unload tasks from its subfolders (tasks/api.py); it needs an API key.
    """

    MOVED: ClassVar = {name: f"it is now limits.{name}" for name in ("max_requests", "stall_seconds")}

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 8 * 1024 * 1024
    api_key: str | None = field(default=None, metadata={"secret": True})
    drain_seconds: float = 30.0
    log_requests: bool = True
    modules_dir: str | None = None
    allowed_origins: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TaskConfig:
    """A task: `module` is `base` or a decode module's folder. Its chat style counts before the manifest's."""

    module: str
    tool_format: str | dict[str, str] | None = None
    layout: ChatLayout | None = None


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EngineConfig):
    """A whole serve config; `tasks` is in the order of /v1/models, a task's text is its module.

    `tool_format` is that of tasks whose config and manifest have none, instead of the chat template's.
    """

    base: str
    tasks: dict[str, str | TaskConfig]
    tool_format: str | dict[str, str] | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    server: ServerConfig = field(default_factory=ServerConfig)

    @property
    def modules(self) -> dict[str, str]:
        """The tasks' modules."""
        return {name: task if isinstance(task, str) else task.module for name, task in self.tasks.items()}


def check_config(config: ServeConfig) -> None:
    """Checks everything that needs no devices.

    Raises:
        PshareError: naming the key, what is allowed and what to do.
    """
    check_engine_config(config)
    parse_style(config.tool_format, None)
    for name, task in config.tasks.items():
        if isinstance(task, TaskConfig):
            parse_style(task.tool_format, task.layout and asdict(task.layout), f"tasks.{name}.")
    check_least([("server.max_body_bytes", config.server.max_body_bytes, 1)])
    if not 0 <= config.server.port <= 65535:
        raise PshareError(f"server.port must be 0 to 65535, not {config.server.port}.")
    if not 0 <= config.server.drain_seconds < math.inf:
        raise PshareError(f"server.drain_seconds must be at least 0 and finite, not {config.server.drain_seconds}.")
    for origin in config.server.allowed_origins:
        if not is_origin(origin):
            raise PshareError(
                f"server.allowed_origins has {origin!r}; write a site as its origin, such as https://ai.example.org or "
                "http://localhost:3000 (no path, no slash at the end), or * for every site."
            )
    key = config.server.api_key
    if key is not None and (not key or key != key.strip()):
        raise PshareError("server.api_key is empty or has blanks around it; give it a value or leave it out.")


def num_cpu_devices(config: ServeConfig) -> int:
    """Number of virtual devices into which a CPU is split (without a placement: one for prefill, one for decode)."""
    if config.placement is None:
        return 2
    highest = max(index for _, worker in workers_of(config.placement) for index in worker.devices)
    return min(highest + 1, MAX_CPU_DEVICES)
