"""Lets glibc keep the memory that a training step frees, for the next step.

XLA on CPU allocates and frees gigabytes every step. glibc gives large blocks back to the kernel at once, and the next step
has to get every page again, zeroed. Imports no jax.
"""

import ctypes
import sys

# mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1


def keep_freed_memory() -> bool:
    """Large blocks come from one heap that never shrinks; False where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return all(mallopt(name, value) == 1 for name, value in wanted)
