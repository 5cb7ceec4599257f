"""KV from one pool to another as the engine moves it: gather, device_put, scatter; on two devices if there are two."""

from typing import Any

import jax

from benchmarks.device import counts
from benchmarks.device.check import Cell, Check
from benchmarks.device.sizes import PAGE
from benchmarks.device.timing import median_seconds
from pshare_jax.engine.kv.device_pages import DevicePages
from pshare_jax.engine.shapes import page_buckets, pages_for, transfer_ranges
from pshare_jax.mesh import make_mesh


def run(check: Check) -> None:
    """A prompt's KV, and a single transfer of it."""
    devices = [0, min(1, len(jax.devices()) - 1)]
    platform = jax.devices()[0].platform
    count = pages_for(check.sizes.handoff, PAGE)
    moves = page_buckets(pages_for(check.sizes.chunk, PAGE), platform)
    # Both pools, and what is on its way.
    if not check.has_room("hand-off", 4.0 * counts.kv_bytes(check.config, check.item) * check.sizes.handoff):
        return
    pools = [DevicePages(check.config, make_mesh([index]), 1 + count, PAGE, check.dtype, moves) for index in devices]
    same = devices[0] == devices[1]
    for pages in (count, moves[-1]):
        where = "on one device" if same else "between two devices"
        check.measure(f"{pages * PAGE} tokens {where}", lambda pages=pages: _one(check, pools, pages, same))


def _one(check: Check, pools: list[DevicePages], num_pages: int, same: bool) -> Cell:
    source, target = pools
    ranges = list(transfer_ranges(0, num_pages, source.move_buckets))

    def move() -> Any:
        for first, last in ranges:
            ids = range(1 + first, 1 + last)
            target.scatter(ids, target.device_put(source.gather(ids)))
        return target.pages

    seconds = median_seconds(move, check.sizes.runs)
    work = counts.handoff(check.config, num_pages * PAGE, check.item, same)
    moved = num_pages * PAGE * counts.kv_bytes(check.config, check.item)
    return check.timed(seconds, work, transfers=len(ranges), gb_s=moved / seconds / 1e9)
