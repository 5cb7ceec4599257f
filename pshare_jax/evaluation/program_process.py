"""Runs one program that a model wrote: `python -I program_process.py`, started by programs.py in a process group of its own.

The standard input has a JSON object {"program", "mark", "cpu_seconds", "memory", "file_bytes"}; the mark is printed once the
program has ended without an exception, so a program that ends its process early has failed.

The limits and the removed functions protect against accidents. They are no sandbox against a program that wants to do harm.
"""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys

MAX_FILES = 64
_REMOVED = {
    os: (
        *("kill", "killpg", "system", "fork", "forkpty", "setuid", "setgid", "chroot"),
        *("remove", "unlink", "removedirs", "rmdir", "rename", "renames", "replace", "truncate", "link", "symlink"),
        *("chmod", "fchmod", "lchmod", "chown", "fchown", "lchown", "fchdir", "setsid", "setpgid", "posix_spawn"),
    ),
    shutil: ("rmtree", "move", "chown"),
    subprocess: ("Popen",),
}


def main() -> None:
    """Runs the program and prints the mark."""
    order, leave = json.loads(sys.stdin.read()), os._exit
    # The program prints into nothing; only this file has the real output.
    with os.fdopen(os.dup(1), "w") as report, open(os.devnull, "r+") as nothing:
        for standard in (0, 1, 2):
            os.dup2(nothing.fileno(), standard)
        _limit(order)
        program = compile(order["program"], "program.py", "exec")
        for module, names in _REMOVED.items():
            for name in names:
                if hasattr(module, name):
                    setattr(module, name, None)
        exec(program, {})
        report.write(order["mark"])
    # Without waiting for threads that the program has left.
    leave(0)


def _limit(order: dict) -> None:
    # Only the hard limit's signal ends the first process of a namespace, which this is with unshare.
    resource.setrlimit(resource.RLIMIT_CPU, (order["cpu_seconds"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
    # macOS refuses a limit of the address space.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (order["memory"],) * 2)


if __name__ == "__main__":
    main()
