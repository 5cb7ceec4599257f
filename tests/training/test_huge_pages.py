"""The restart of a training process keeps what a user can see of it, and happens once."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="does nothing off Linux")

SCRIPT = """
import json, os, sys
from pshare_jax.training.huge_pages import restart_with_huge_pages
print(os.getpid(), flush=True)
restart_with_huge_pages()
print(json.dumps([sys.argv, sys.stdin.read(), os.environ["GLIBC_TUNABLES"]]))
sys.exit(3)
"""


def run_script(tmp_path, **environment: str) -> list[str]:
    """Lines printed; the process also must end as the script says."""
    script = tmp_path / "a script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, "-X", "utf8", script, "one two", "--three", "ä"],
        input="asked",
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | environment,
    )
    assert (ended.returncode, ended.stderr) == (3, "")
    return ended.stdout.splitlines()


def test_it_is_the_same_process_with_the_same_command_line(tmp_path):
    first, second, told = run_script(tmp_path)
    assert first == second
    assert json.loads(told) == [
        [str(tmp_path / "a script.py"), "one two", "--three", "ä"],
        "asked",
        "glibc.malloc.hugetlb=1",
    ]


def test_what_the_user_set_stays(tmp_path):
    _, told = run_script(tmp_path, GLIBC_TUNABLES="glibc.malloc.check=0")
    assert json.loads(told)[2] == "glibc.malloc.check=0"
