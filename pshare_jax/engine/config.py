"""What an engine is configured by: placement of its workers on devices, KV pools, batches.

Given workers are checked, absent ones are chosen from the platform. Imports no jax.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from pshare_jax.errors import PshareError


@dataclass(frozen=True)
class PrefillPlacement:
    """One prefill worker: indices of its devices, over all of which it is tensor-parallel."""

    devices: list[int]


@dataclass(frozen=True)
class DecodePlacement:
    """One decode worker: indices of its devices, over all of which it is tensor-parallel, and the tasks it serves."""

    devices: list[int]
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
        return Placement([PrefillPlacement([0])], [DecodePlacement([0])])
    if platform == "cpu":
        return Placement([PrefillPlacement([0])], [DecodePlacement([1])])
    half = num_devices // 2
    return Placement(
        [PrefillPlacement([index]) for index in range(half)],
        [DecodePlacement([index]) for index in range(half, num_devices)],
    )


def workers_of(placement: Placement) -> list[tuple[str, PrefillPlacement | DecodePlacement]]:
    """Every worker with its key in the config."""
    return [
        *((f"placement.prefill.{i}", worker) for i, worker in enumerate(placement.prefill)),
        *((f"placement.decode.{i}", worker) for i, worker in enumerate(placement.decode)),
    ]


def check_placement(placement: Placement, tasks: Collection[str]) -> None:
    """Checks what needs no devices.

    Raises:
        PshareError: naming the key and the way out.
    """
    _check_workers(placement)
    _check_tasks(placement.decode, tasks)


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
            raise PshareError(f"placement.decode.{i}.tasks is empty; name a task or leave the key out for all.")
        served.update(names)
    for name in tasks:
        if name not in served:
            raise PshareError(f"No decode worker serves the task {name!r}; add it to the tasks of one in placement.")
