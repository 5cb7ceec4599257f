"""The restart of a training process keeps what a user can see of it, and happens once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pshare_jax.training import cli
from pshare_jax.training.huge_pages import restart_with_huge_pages

KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
WAITS = KERNEL.exists() and "[madvise]" in KERNEL.read_text()
pytestmark = pytest.mark.skipif(not WAITS, reason="this kernel does not wait to be asked for huge pages")

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


def test_the_command_asks_before_it_trains_and_a_call_with_arguments_never(tmp_path, monkeypatch, capsys):
    """It ends with one sentence here, since there is no such config."""
    asked = []
    monkeypatch.setattr(cli, "restart_with_huge_pages", lambda: asked.append(capsys.readouterr().out))
    config = ["--config", str(tmp_path / "missing.yaml")]
    monkeypatch.setattr(sys, "argv", ["pshare-train", *config])
    assert cli.main() == 2
    assert asked == [""], "before anything is printed, which would come twice"
    assert cli.main(config) == 2
    monkeypatch.setattr(sys, "argv", ["pshare-train", *config, "--print-config"])
    assert cli.main() == 2
    # A notebook's own arguments, say.
    monkeypatch.setattr(sys, "argv", ["pshare-train", "--no-such"])
    with pytest.raises(SystemExit):
        cli.main()
    assert asked == [""]


def test_other_commands_are_left_alone(monkeypatch):
    """A program read from stdin, one that changed its own arguments, one under a debugger."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started anew"))
    monkeypatch.setattr(sys, "argv", ["-", *sys.argv[1:]])
    restart_with_huge_pages()
    monkeypatch.setattr(sys, "argv", ["train.py", "--not", "of this command"])
    restart_with_huge_pages()
    monkeypatch.setattr(sys, "argv", ["train.py", *sys.orig_argv[1:]])
    monkeypatch.setattr(sys, "gettrace", lambda: print)
    restart_with_huge_pages()


def test_a_start_that_the_system_refuses_goes_on(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    asked = []

    def refuse(_path, command, environment):
        asked.append((command, environment["GLIBC_TUNABLES"]))
        raise PermissionError

    monkeypatch.setattr(os, "execve", refuse)
    monkeypatch.setattr(sys, "argv", ["train.py", *sys.orig_argv[1:]])
    restart_with_huge_pages()
    assert asked == [([sys.executable, *sys.orig_argv[1:]], "glibc.malloc.hugetlb=1")]
    assert "GLIBC_TUNABLES" not in os.environ
