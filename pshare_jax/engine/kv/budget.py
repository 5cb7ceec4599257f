"""Device memory: how many pages the pools have room for (`kv.pages: auto`), and the table of who holds what.

The builder (build.py) calls it, with `memory_stats` of the devices. CPU devices have none: they share the host's memory.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import PshareError

SHARE = 0.9
"""Of what is left on a device: XLA's allocator leaves gaps."""
HOST_SHARE = 0.25
"""Of what is free on a machine whose CPU is the device: it has other work, and programs' temporaries are not counted."""
HOST_ROW_TOKENS = 1024
"""Most tokens of a CPU's pool for each decode row, if that is more than one of the longest prompts: zeroing a pool takes about a
second a GiB at start."""
MIB = 2**20


@dataclass(frozen=True)
class PoolNeed:
    """A pool to be sized: its devices, bytes of one page on each of them, pages that may be on their way there."""

    name: str
    devices: tuple[Any, ...]
    page_bytes: int
    pages_in_flight: int


@dataclass(frozen=True)
class Room:
    """The bytes that pools may take of a device, or of the host for all CPU devices; `found` says how they were found."""

    num_bytes: int
    found: str


def rooms(needs: Sequence[PoolNeed], temporaries: int, free_host: Callable[[], int]) -> dict[Any, Room]:
    """The room on every device of the pools, once weights are there. `temporaries` are those of the largest program."""
    devices = {device: device.memory_stats() for need in needs for device in need.devices}
    # One room for all CPU devices.
    host = functools.cache(lambda: _host_room(free_host()))
    return {
        device: _device_room(device, stats, temporaries, in_flight(device, needs)) if stats else host()
        for device, stats in devices.items()
    }


def in_flight(device: Any, needs: Iterable[PoolNeed]) -> int:
    """Most bytes of transfers on a device."""
    return sum(need.pages_in_flight * need.page_bytes for need in needs if device in need.devices)


def pages_that_fit(needs: Sequence[PoolNeed], room: Mapping[Any, Room], least: int, most: int) -> dict[str, int]:
    """Pages of every pool: pools with a device in common, or on one host, have equal parts of its room. No more than `most`.

    Raises:
        PshareError: a pool would have fewer than `least`.
    """
    page_bytes: dict[int, int] = {}
    for need in needs:
        for device in need.devices:
            key = id(room[device])
            page_bytes[key] = page_bytes.get(key, 0) + need.page_bytes
    pages = {}
    for need in needs:
        fit = {device: room[device].num_bytes // page_bytes[id(room[device])] for device in need.devices}
        tightest = min(fit, key=lambda device: fit[device])
        if fit[tightest] < least:
            raise PshareError(
                f"the {need.name} would have {max(0, fit[tightest])} KV pages of {page_bytes[id(room[tightest])]:,} bytes, "
                f"but needs at least {least}: {room[tightest].found}; use a device with more memory, fewer full modules, or "
                "a lower batch.prefill_tokens, or set kv.pages to the number of pages you want."
            )
        pages[need.name] = min(max(least, _coarse(fit[tightest])), most)
    return pages


def _coarse(num_pages: int) -> int:
    """At most an eighth less: pools, and so programs, have the same sizes at the next start, though a little more is in use."""
    return num_pages - num_pages % (1 << max(0, num_pages.bit_length() - 4))


def _host_room(free: int) -> Room:
    room = int(free * HOST_SHARE)
    return Room(room, f"{_mib(free)} of this machine's memory are free, of which KV pages take {HOST_SHARE:.0%}")


def _device_room(device: Any, stats: Mapping[str, int], temporaries: int, transfers: int) -> Room:
    limit, used = stats["bytes_limit"], stats["bytes_in_use"]
    return Room(
        int(max(0, limit - used - temporaries - transfers) * SHARE),
        f"{device.platform} {device.id} has {_mib(limit)}, of which weights take {_mib(used)}, programs' temporaries "
        f"{_mib(temporaries)} and transfers {_mib(transfers)}, and pages {SHARE:.0%} of the rest",
    )


@dataclass(frozen=True)
class Holdings:
    """Arrays on the engine's devices, by who holds them; the same array may be in several."""

    base: Collection[Any]
    tasks: Collection[Any]
    pools: Collection[Any]


def table(
    holdings: Holdings, needs: Sequence[PoolNeed], temporaries: int | None, free_host: Callable[[], int]
) -> list[str]:
    """The memory of every device in MiB, in lines. What a CPU device may use, and what is left, is only known of the host."""
    devices = sorted({device for need in needs for device in need.devices}, key=lambda device: device.id)
    lines = [_line("memory in MiB", ["limit", "base", "tasks", "pools", "programs", "transfers", "free"])]
    sums = [0] * 4
    for device in devices:
        base, tasks, pools = _bytes_on(device, holdings)
        transfers, stats = in_flight(device, needs), device.memory_stats()
        sums = [total + part for total, part in zip(sums, (base, tasks, pools, transfers), strict=True)]
        limit = stats["bytes_limit"] if stats else None
        free = limit and limit - stats["bytes_in_use"] - (temporaries or 0) - transfers
        lines.append(_row(f"{device.platform} {device.id}", limit, base, tasks, pools, temporaries, transfers, free))
    if any(device.memory_stats() is None for device in devices):
        *held, transfers = sums
        lines.append(_row("the machine", None, *held, temporaries, transfers, free_host()))
    return lines


def _bytes_on(device: Any, holdings: Holdings) -> list[int]:
    """Bytes of base, tasks and pools; an array counts for the first that has it."""
    counted: set[int] = set()
    sizes = []
    for arrays in (holdings.base, holdings.tasks, holdings.pools):
        new = {id(array): array for array in arrays if id(array) not in counted}
        counted |= new.keys()
        sizes.append(sum(_shard_bytes(array) for array in new.values() if device in array.sharding.device_set))
    return sizes


def _shard_bytes(array: Any) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _row(name: str, *sizes: int | None) -> str:
    return _line(name, ["-" if size is None else f"{size / MIB:,.0f}" for size in sizes])


def _line(name: str, cells: Iterable[str]) -> str:
    return f"{name:<14}" + "".join(f"{cell:>11}" for cell in cells)


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
