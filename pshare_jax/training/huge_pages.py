"""Has glibc ask the kernel for huge pages, for a training process on Linux.

XLA on CPU allocates and frees gigabytes every step, and the kernel has to get every page of them again, zeroed. In pages of
2 MiB that costs little. (A heap that keeps what is freed is as fast, but glibc's aligned allocation does not find the place
that it freed before, so gigabytes lie there twice.)
"""

import contextlib
import os
import sys
from pathlib import Path

_VARIABLE = "GLIBC_TUNABLES"
"""Read by glibc when a process starts, and never again."""

_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""Who gets huge pages: `always madvise never`, one of them in brackets. Only under madvise does asking change anything."""


def restart_with_huge_pages() -> None:
    """Starts this process anew, under the same number and with the same command line, in an environment that asks for huge
    pages; its child processes inherit that.

    Does nothing in a process that was started so, where the user has set the variable, where the kernel does not wait to be
    asked, under a debugger, and for a program read from stdin, which cannot be read again.
    """
    if _VARIABLE in os.environ or not _kernel_waits() or sys.gettrace() is not None or not _command_is_known():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            os.environ | {_VARIABLE: "glibc.malloc.hugetlb=1"},
        )


def _kernel_waits() -> bool:
    try:
        return "[madvise]" in _KERNEL.read_text()
    except OSError:
        return False


def _command_is_known() -> bool:
    arguments = sys.argv[1:]
    ours = sys.orig_argv[len(sys.orig_argv) - len(arguments) :] == arguments
    return bool(sys.executable) and sys.argv[0] not in ("", "-") and ours
