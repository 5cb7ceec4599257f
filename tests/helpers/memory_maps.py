"""Every program that XLA compiles takes several memory maps, of which Linux grants a process 65,530: beyond, it dies."""

import gc
from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")


def drop_programs(most: int) -> None:
    """Forgets all compiled programs if the process has more memory maps than that."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > most:
        jax.clear_caches()
        gc.collect()
