"""Freed arrays go back to the system, so that a training process holds on a CPU what its arrays take and no more.

glibc learns to keep freed blocks of up to 32 MiB for later ones, and weights, gradients and moments are such blocks. Others
lie between them by then, the next step's do not fit, and gigabytes stay unused. Imports no jax.
"""

import ctypes
import sys

MMAP_THRESHOLD = 1 << 20
"""Bytes from which a block is asked of the system alone, and given back when it is freed."""

_M_MMAP_THRESHOLD = -3
"""glibc's number for it (malloc.h). Setting it also ends that glibc raises it."""


def return_freed_arrays() -> None:
    """For this whole process: called by the command, not by the library. Does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
