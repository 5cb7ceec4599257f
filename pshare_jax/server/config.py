"""What a serve config may say, and which devices each worker gets.

The command line loads a `ServeConfig`, asks how many virtual devices a CPU must show, and once the devices are known
resolves the placement: given workers are checked, absent ones are chosen from the platform. Imports no jax.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from pshare_jax.errors import PshareError
from pshare_jax.settings import check_least

MAX_CPU_DEVICES = 64


@dataclass(frozen=True)
class PrefillPlacement:
    """One prefill worker: device indices and its tensor-parallel degree (absent: all its devices)."""

    devices: list[int]
    tp: int | None = None


@dataclass(frozen=True)
class DecodePlacement:
    """One decode worker: device indices, tensor-parallel degree (absent: all its devices) and the tasks it serves."""

    devices: list[int]
    tp: int | None = None
    tasks: Literal["all"] | list[str] = "all"


@dataclass(frozen=True)
class Placement:
    """All workers of the server."""

    prefill: list[PrefillPlacement]
    decode: list[DecodePlacement]


@dataclass(frozen=True)
class KVConfig:
    """KV pools: tokens of a page, and pages of each worker's pool (one of them is for padding)."""

    page_size: int = 16
    pages: int = 2048


@dataclass(frozen=True)
class BatchConfig:
    """Most tokens of one prefill step, and most sequences of one decode step."""

    prefill_tokens: int = 512
    decode_rows: int = 16


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
        _check_workers(config.placement)
        _check_tasks(config.placement.decode, config.tasks)


def num_cpu_devices(config: ServeConfig) -> int:
    """How many virtual devices a CPU must show for this config (without a placement: one prefill, one decode).

    Raises:
        PshareError: an index is beyond what a CPU is split into.
    """
    if config.placement is None:
        return 2
    highest = max(index for _, worker in _workers(config.placement) for index in worker.devices)
    return min(highest + 1, MAX_CPU_DEVICES)


def resolve_placement(config: ServeConfig, platform: str, num_devices: int) -> Placement:
    """The placement with every `tp` filled in, for a machine with `num_devices` devices of `platform`.

    Raises:
        PshareError: a worker names a device that does not exist.
    """
    placement = config.placement or _default_placement(platform, num_devices)
    for name, worker in _workers(placement):
        for index in worker.devices:
            if index >= num_devices:
                raise PshareError(
                    f"{name}.devices names device {index}, but there are {num_devices} {platform} devices, "
                    f"0 to {num_devices - 1}."
                )
    return Placement(
        [PrefillPlacement(w.devices, len(w.devices)) for w in placement.prefill],
        [DecodePlacement(w.devices, len(w.devices), w.tasks) for w in placement.decode],
    )


def worker_tasks(worker: DecodePlacement, tasks: Sequence[str]) -> list[str]:
    """The tasks a decode worker serves, in the config's order."""
    return list(tasks) if worker.tasks == "all" else [name for name in tasks if name in worker.tasks]


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


def _default_placement(platform: str, num_devices: int) -> Placement:
    if platform == "cpu":
        return Placement([PrefillPlacement([0])], [DecodePlacement([1])])
    if num_devices == 1:
        return Placement([PrefillPlacement([0])], [DecodePlacement([0])])
    half = num_devices // 2
    return Placement(
        [PrefillPlacement([index]) for index in range(half)],
        [DecodePlacement([index]) for index in range(half, num_devices)],
    )


def _workers(placement: Placement) -> list[tuple[str, PrefillPlacement | DecodePlacement]]:
    return [
        *((f"placement.prefill.{i}", worker) for i, worker in enumerate(placement.prefill)),
        *((f"placement.decode.{i}", worker) for i, worker in enumerate(placement.decode)),
    ]


def _check_workers(placement: Placement) -> None:
    for side in ("prefill", "decode"):
        workers = getattr(placement, side)
        if not workers:
            raise PshareError(f"placement.{side} is empty; name at least one worker, such as {{devices: [0]}}.")
        taken: dict[int, int] = {}
        for i, worker in enumerate(workers):
            _check_devices(f"placement.{side}.{i}", worker)
            for index in worker.devices:
                if index in taken:
                    raise PshareError(
                        f"placement.{side}.{taken[index]} and placement.{side}.{i} both name device {index}; "
                        f"give each {side} worker devices of its own."
                    )
                taken[index] = i


def _check_devices(name: str, worker: PrefillPlacement | DecodePlacement) -> None:
    devices = worker.devices
    if not devices:
        raise PshareError(f"{name}.devices is empty; name at least one device, such as [0].")
    if min(devices) < 0:
        raise PshareError(f"{name}.devices names device {min(devices)}; devices are counted from 0.")
    if len(set(devices)) != len(devices):
        raise PshareError(f"{name}.devices names a device twice: {devices}.")
    if worker.tp is not None and worker.tp != len(devices):
        raise PshareError(
            f"{name}.tp is {worker.tp} but it has {len(devices)} devices; one worker is tensor-parallel over exactly "
            "its devices, so make the two equal or name more workers."
        )


def _check_tasks(workers: Sequence[DecodePlacement], tasks: dict[str, str]) -> None:
    served = set()
    for i, worker in enumerate(workers):
        names = list(tasks) if worker.tasks == "all" else worker.tasks
        for name in names:
            if name not in tasks:
                raise PshareError(
                    f"placement.decode.{i}.tasks names {name!r}, which is not in tasks ({', '.join(tasks)})."
                )
        if len(set(names)) != len(names):
            raise PshareError(f"placement.decode.{i}.tasks names a task twice: {', '.join(names)}.")
        if not names:
            raise PshareError(f"placement.decode.{i}.tasks is empty; name a task or leave the key out for all.")
        served.update(names)
    for name in tasks:
        if name not in served:
            raise PshareError(f"No decode worker serves the task {name!r}; add it to the tasks of one in placement.")
