"""How much memory of this machine is free: what the kernel says is available, within the limits of the process's cgroups."""

import os
from collections.abc import Iterator
from pathlib import Path


def free_host_memory(root: Path = Path("/")) -> int:
    """Free bytes; without /proc all of the machine's. `root` is where `proc` and `sys` are."""
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = dict(line.split(":") for line in meminfo.splitlines())
    return min([int(lines["MemAvailable"].split()[0]) * 1024, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """What the process's cgroup and those above it leave, of version 1 and 2. File caches count as free."""
    for folder in _cgroups(root):
        for limit, usage, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most = (folder / limit).read_text().strip()
                used = int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if most != "max":
                yield max(0, int(most) - used + int(stat.get(cache, 0)))


def _cgroups(root: Path) -> Iterator[Path]:
    try:
        entries = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in entries:
        if controllers in ("", "memory"):
            mount = root / "sys/fs/cgroup" / controllers
            # In a container the path may be that of the host, and only the mount itself is visible.
            inside = mount / path.lstrip("/")
            yield from (folder for folder in (inside, *inside.parents) if folder.is_relative_to(mount))
