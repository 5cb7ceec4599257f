"""The verifier `code`: runs what a model wrote with the task's tests, by the rules of HumanEval (arXiv 2107.03374).

A record has `test` (Python text, or a list of statements); with an `entry_point`, as in HumanEval, the answer continues the
record's `prompt`, and the test defines `check(function)`. A program is right if it ends without an exception.

Each program runs in a process group of its own (program_process.py) in an empty folder that is removed afterwards, without the
environment's variables, with limits on CPU time, memory and files, and where the system allows namespaces also without network
and other processes. Files of the user can still be read and overwritten.
"""

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from pshare_jax.evaluation import program_process

MEMORY = 4 << 30
"""Bytes of address space; NumPy alone reserves more than 1 GiB."""
FILE_BYTES = 16 << 20
SPARE_SECONDS = 5
"""Real time beyond twice the CPU time, after which a program that waits is ended."""
_ISOLATED = ("unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
_FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


class CodeVerifier:
    """1.0 if the answer's program passes the record's tests, else 0.0. A program has `cpu_seconds` of CPU time."""

    def __init__(self, cpu_seconds: int = 3):
        self._cpu_seconds = cpu_seconds

    def __call__(self, answer: str, record: Mapping[str, Any]) -> float:
        """Runs the program of an answer; 0 also for a record without tests."""
        return float(any(map(self.passes, programs_of(answer, record))))

    def passes(self, program: str) -> bool:
        """Whether the program ends within its limits and without an exception."""
        mark = secrets.token_hex(16)
        order = {"program": program, "mark": mark, "cpu_seconds": self._cpu_seconds}
        order |= {"memory": MEMORY, "file_bytes": FILE_BYTES}
        command = [*(_ISOLATED if isolates() else ()), sys.executable, "-I", program_process.__file__]
        with tempfile.TemporaryDirectory(prefix="pshare-code-", ignore_cleanup_errors=True) as folder:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
            try:
                # CPU time, and not the clock, decides as long as a program computes: a busy machine changes no score.
                output, _ = process.communicate(json.dumps(order), timeout=2 * self._cpu_seconds + SPARE_SECONDS)
            except subprocess.TimeoutExpired:
                output = ""
            finally:
                _end(process)
        return output == mark


def programs_of(answer: str, record: Mapping[str, Any]) -> list[str]:
    """The programs that an answer may stand for: its first fenced block, or all of it, and the tests; none without tests.

    Chat templates strip an answer, also of the indentation of its first line, so a second program has that of the prompt's last.
    """
    test, entry_point, prompt = record.get("test"), record.get("entry_point"), record.get("prompt")
    if isinstance(test, list):
        test = "\n".join(map(str, test))
    if not isinstance(test, str) or not test.strip():
        return []
    fenced = _FENCE.search(answer)
    code = fenced[1] if fenced else answer
    if not isinstance(entry_point, str) or not isinstance(prompt, str):
        return [f"{code}\n{test}\n"]
    after = f"\n{test}\ncheck({entry_point})\n"
    if fenced:
        return [f"{prompt}\n{code}{after}"]
    last = prompt.rstrip().rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())]
    return [f"{prompt}{code}{after}", *([f"{prompt}{indent}{code}{after}"] if code == code.lstrip() and indent else [])]


@functools.cache
def isolates() -> bool:
    """Whether this system gives a program namespaces of its own, without network and other processes."""
    if shutil.which(_ISOLATED[0]) is None:
        return False
    return subprocess.run([*_ISOLATED, "true"], capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends the whole group, also what a program that has ended left running."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
