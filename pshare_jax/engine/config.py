"""An engine's configuration: tasks, placement of its workers on devices, KV pools, batches, limits."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from pshare_jax.engine.router import Policy
from pshare_jax.errors import PshareError
from pshare_jax.model.paged_batch import AttentionForm
from pshare_jax.settings import check_least

Auto = Literal["auto"]
GPUS = ("gpu", "cuda", "rocm")
"""JAX's names of the platform."""
_MOVED = {"tp": "a worker is tensor-parallel over all its devices, so leave it out"}


@dataclass(frozen=True)
class PrefillPlacement:
    """A prefill worker: indices of its devices, over all of which it is tensor-parallel."""

    MOVED: ClassVar = _MOVED

    devices: list[int]


@dataclass(frozen=True)
class DecodePlacement:
    """A decode worker: indices of its devices, over all of which it is tensor-parallel, and the tasks it serves."""

    MOVED: ClassVar = _MOVED

    devices: list[int]
    tasks: Literal["all"] | list[str] = "all"


@dataclass(frozen=True)
class Placement:
    """All workers of the engine."""

    prefill: list[PrefillPlacement]
    decode: list[DecodePlacement]


@dataclass(frozen=True)
class KVConfig:
    """KV pools: tokens per page, pages per worker's pool (including the padding page; auto: as many as memory has room for,
    kv/budget.py), and the share of a pool's pages that sessions may pin (0: no pins).
    """

    page_size: int = 16
    pages: int | Auto = "auto"
    pinned_share: float = 0.5


@dataclass(frozen=True)
class BatchConfig:
    """The most tokens of one prefill step, and the most sequences of one decode step (auto: the platform's, `DEFAULTS`).

    `pipelined` dispatches a decode step before the tokens of the step before are fetched.
    """

    prefill_tokens: int | Auto = "auto"
    decode_rows: int | Auto = "auto"
    pipelined: bool = True


@dataclass(frozen=True)
class LimitsConfig:
    """The most waiting and running requests (auto: the platform's, `DEFAULTS`), and the seconds without progress after which
    a request fails.
    """

    max_requests: int | Auto = "auto"
    stall_seconds: float = 300.0


@dataclass(frozen=True)
class Defaults:
    """What `auto` stands for on a platform."""

    prefill_tokens: int
    decode_rows: int
    max_requests: int


ACCELERATOR = Defaults(prefill_tokens=2048, decode_rows=64, max_requests=1024)
"""A decode step reads all weights once, whatever its rows: 64 rows of an 8B model take little longer than one, and with 8k
tokens each they fill 80 GB. A prefill step computes, so that 2,048 tokens use the chip, in a time (50 to 100 ms for an 8B
model) that a colocated decode step can wait."""
DEFAULTS = {"cpu": Defaults(prefill_tokens=512, decode_rows=16, max_requests=256)}
"""On other platforms `ACCELERATOR`. A CPU computes in both steps: rows and tokens cost time, and answers would wait."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that `Engine.build` needs besides the model.

    `tasks` maps a task's name to `base`, a decode module's folder or a `DecodeModule`. With `sharing: shared` the base
    prefills for all tasks, with `isolated` (the baseline) each task's own weights do. `routing` is the router's policy.
    `attention` over pages is plain `xla` or a `pallas` kernel for GPUs (auto: pallas on GPUs, xla elsewhere; on a CPU pallas is
    interpreted, which is for tests). `debug` fills freed pages with NaN.
    """

    tasks: Mapping[str, Any]
    sharing: Literal["shared", "isolated"] = "shared"
    placement: Placement | None = None
    kv: KVConfig = field(default_factory=KVConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    routing: Policy = "prefix"
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    attention: AttentionForm | Auto = "auto"
    debug: bool = False


def check_engine_config(config: EngineConfig) -> None:
    """Checks everything that needs no devices.

    Raises:
        PshareError: naming the key, what is allowed and what to do.
    """
    if not config.tasks:
        raise PshareError("tasks is empty; name at least one, such as tasks.chat=base.")
    if "" in config.tasks:
        raise PshareError("A task in tasks has an empty name; give it a name.")
    numbers: list[tuple[str, int | Auto, int]] = [
        ("kv.page_size", config.kv.page_size, 1),
        # The padding page and two for tokens.
        ("kv.pages", config.kv.pages, 3),
        ("batch.prefill_tokens", config.batch.prefill_tokens, 1),
        ("batch.decode_rows", config.batch.decode_rows, 1),
        ("limits.max_requests", config.limits.max_requests, 1),
    ]
    check_least((key, value, least) for key, value, least in numbers if not isinstance(value, str))
    if not 0 <= config.kv.pinned_share <= 1:
        raise PshareError(f"kv.pinned_share must be a number from 0 to 1, not {config.kv.pinned_share}.")
    if not config.limits.stall_seconds > 0:
        raise PshareError(f"limits.stall_seconds must be more than 0, not {config.limits.stall_seconds}.")
    if config.placement is not None:
        _check_workers(config.placement)
        _check_tasks(config.placement.decode, config.tasks)


def placed(prefill: Sequence[list[int]], decode: Sequence[list[int]]) -> Placement:
    """Workers on these devices; each decode worker serves all tasks."""
    return Placement(
        [PrefillPlacement(devices) for devices in prefill], [DecodePlacement(devices) for devices in decode]
    )


def resolve(config: EngineConfig, platform: str, num_devices: int) -> EngineConfig:
    """The config with all that it leaves to the platform, but for `kv.pages`.

    Raises:
        PshareError: a worker names a device that does not exist, or the platform does not have the form of attention.
    """
    defaults, batch, limits = DEFAULTS.get(platform, ACCELERATOR), config.batch, config.limits
    return replace(
        config,
        placement=resolve_placement(config.placement, platform, num_devices),
        batch=replace(
            batch,
            prefill_tokens=_or(batch.prefill_tokens, defaults.prefill_tokens),
            decode_rows=_or(batch.decode_rows, defaults.decode_rows),
        ),
        limits=replace(limits, max_requests=_or(limits.max_requests, defaults.max_requests)),
        attention=attention_form(config.attention, platform),
    )


def resolved(value: int | Auto) -> int:
    """A number of a resolved config."""
    assert value != "auto"
    return value


def attention_form(form: AttentionForm | Auto, platform: str) -> AttentionForm:
    """The form of attention that a setting means on a platform.

    Raises:
        PshareError: the platform does not have it.
    """
    if form == "auto":
        return "pallas" if platform in GPUS else "xla"
    if form == "pallas" and platform not in (*GPUS, "cpu"):
        raise PshareError(
            f"attention: pallas is a kernel for GPUs, and JAX runs on {platform}; set attention to auto or xla."
        )
    return form


def _or(value: int | Auto, default: int) -> int:
    return default if value == "auto" else value


def resolve_placement(placement: Placement | None, platform: str, num_devices: int) -> Placement:
    """The placement on a machine with `num_devices` devices of `platform`; None takes the platform's default.

    Raises:
        PshareError: a worker names a device that does not exist.
    """
    placement = placement or _default_placement(platform, num_devices)
    for name, worker in workers_of(placement):
        for index in worker.devices:
            if index >= num_devices:
                raise PshareError(
                    f"{name}.devices names device {index}, but there are {num_devices} {platform} devices, "
                    f"0 to {num_devices - 1}."
                )
    return placement


def worker_tasks(worker: DecodePlacement, tasks: Sequence[str]) -> list[str]:
    """The tasks a decode worker serves, in the config's order."""
    return list(tasks) if worker.tasks == "all" else [name for name in tasks if name in worker.tasks]


def _default_placement(platform: str, num_devices: int) -> Placement:
    if num_devices == 1:
        return placed([[0]], [[0]])
    if platform == "cpu":
        return placed([[0]], [[1]])
    half = num_devices // 2
    return placed([[index] for index in range(half)], [[index] for index in range(half, num_devices)])


def workers_of(placement: Placement) -> list[tuple[str, PrefillPlacement | DecodePlacement]]:
    """Every worker with its config key."""
    return [
        *((f"placement.prefill.{i}", worker) for i, worker in enumerate(placement.prefill)),
        *((f"placement.decode.{i}", worker) for i, worker in enumerate(placement.decode)),
    ]


def _check_workers(placement: Placement) -> None:
    for kind in ("prefill", "decode"):
        workers = getattr(placement, kind)
        if not workers:
            raise PshareError(f"placement.{kind} is empty; name at least one worker, such as {{devices: [0]}}.")
        taken: dict[int, int] = {}
        for i, worker in enumerate(workers):
            _check_devices(f"placement.{kind}.{i}", worker)
            for index in worker.devices:
                if index in taken:
                    raise PshareError(
                        f"placement.{kind}.{taken[index]} and placement.{kind}.{i} both name device {index}; "
                        f"give each {kind} worker devices of its own."
                    )
                taken[index] = i


def _check_devices(name: str, worker: PrefillPlacement | DecodePlacement) -> None:
    devices = worker.devices
    if not devices:
        raise PshareError(f"{name}.devices is empty; name at least one device, such as [0].")
    if min(devices) < 0:
        raise PshareError(f"{name}.devices names device {min(devices)}; indices start at 0.")
    if len(set(devices)) != len(devices):
        raise PshareError(f"{name}.devices names a device twice: {devices}.")


def _check_tasks(workers: Sequence[DecodePlacement], tasks: Collection[str]) -> None:
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
            raise PshareError(f"placement.decode.{i}.tasks is empty; name a task or omit the key for all.")
        served.update(names)
    for name in tasks:
        if name not in served:
            raise PshareError(f"No decode worker serves the task {name!r}; add it to the tasks of a worker.")
