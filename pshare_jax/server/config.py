"""What a serve config may say: the engine's part is in engine/config.py. Imports no jax."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pshare_jax.engine.config import BatchConfig, KVConfig, Placement, check_placement, workers_of
from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least

MAX_CPU_DEVICES = 64


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side: address (port 0 = any free one), largest request body, most requests waiting or running, and how
    long a request may make no progress before it is given up. With `api_key` (absent: the environment variable
    PSHARE_API_KEY) clients must send it as a bearer token. A stop lets running answers end for `drain_seconds`.
    `log_requests` writes a JSON line for each call to the standard error. With `modules_dir` clients may load, replace
    and unload tasks whose folders lie below it (task_api.py); that needs an API key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 8 * 1024 * 1024
    max_requests: int = 256
    stall_seconds: float = 300.0
    api_key: str | None = field(default=None, metadata={"secret": True})
    drain_seconds: float = 30.0
    log_requests: bool = True
    modules_dir: str | None = None


@dataclass(frozen=True)
class ServeConfig:
    """A whole serve config; `tasks` maps a served name to `base` or a decode module folder, in /v1/models' order.

    `routing` is how requests find their prefill worker. `debug` fills pages that were given back with NaN.
    """

    base: str
    tasks: dict[str, str]
    sharing: Literal["shared", "isolated"] = "shared"
    placement: Placement | None = None
    kv: KVConfig = field(default_factory=KVConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    routing: Literal["prefix", "round_robin", "least_loaded"] = "prefix"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    debug: bool = False
    server: ServerConfig = field(default_factory=ServerConfig)


def check_config(config: ServeConfig) -> None:
    """Checks everything that needs no devices.

    Raises:
        PshareError: naming the key and the way out.
    """
    if not config.tasks:
        raise PshareError("tasks is empty; name at least one, such as tasks.chat=base.")
    if "" in config.tasks:
        raise PshareError("A task in tasks has an empty name; give it one.")
    if not 0 <= config.server.port <= 65535:
        raise PshareError(f"server.port must be 0 to 65535, not {config.server.port}.")
    check_least(_least_values(config))
    if not config.server.stall_seconds > 0:
        raise PshareError(f"server.stall_seconds must be more than 0, not {config.server.stall_seconds}.")
    if not 0 <= config.server.drain_seconds < math.inf:
        raise PshareError(f"server.drain_seconds must be at least 0 and finite, not {config.server.drain_seconds}.")
    key = config.server.api_key
    if key is not None and (not key or key != key.strip()):
        raise PshareError("server.api_key is empty or has blanks around it; give it a value or leave it out.")
    if config.placement is not None:
        check_placement(config.placement, config.tasks)


def num_cpu_devices(config: ServeConfig) -> int:
    """How many virtual devices a CPU must show for this config (without a placement: one prefill, one decode).

    Raises:
        PshareError: an index is beyond what a CPU is split into.
    """
    if config.placement is None:
        return 2
    highest = max(index for _, worker in workers_of(config.placement) for index in worker.devices)
    return min(highest + 1, MAX_CPU_DEVICES)


def _least_values(config: ServeConfig) -> list[tuple[str, int | None, int]]:
    return [
        ("server.max_body_bytes", config.server.max_body_bytes, 1),
        ("server.max_requests", config.server.max_requests, 1),
        ("kv.page_size", config.kv.page_size, 1),
        # The padding page, and two that can be lent.
        ("kv.pages", config.kv.pages, 3),
        ("batch.prefill_tokens", config.batch.prefill_tokens, 1),
        ("batch.decode_rows", config.batch.decode_rows, 1),
    ]
