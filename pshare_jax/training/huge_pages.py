"""Has glibc ask the kernel for huge pages, for a training process on Linux.

XLA on CPU allocates and frees gigabytes every step, and the kernel has to get every page of them again, zeroed. In pages of
2 MiB that costs little. (A heap that keeps what is freed is as fast, but glibc's aligned allocation does not find the place
that it freed before, so gigabytes lie there twice.) Imports no jax.
"""

import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
"""Read by glibc when a process starts, and never again."""


def restart_with_huge_pages() -> None:
    """Starts this process anew, under the same number and with the same command line, in an environment that asks for huge
    pages. Does nothing in a process that has been started so, where the user has set the variable, or off Linux. Where the
    kernel or the C library knows no such thing, nothing changes but the variable.
    """
    if not sys.platform.startswith("linux") or _VARIABLE in os.environ:
        return
    os.environ[_VARIABLE] = "glibc.malloc.hugetlb=1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
