"""benchmarks/device_check.py: all parts run where packages are missing; what fails or does not fit is named, the rest runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks.agents_load.workload import Call, Session
from benchmarks.device import agents, command, decode, sizes
from benchmarks.device.absent import NAMES
from benchmarks.device.cards import Peaks
from benchmarks.device.check import Check, Clock, run_part
from benchmarks.device.counts import Work
from benchmarks.device.report import markdown
from pshare_jax.engine.request import Event
from pshare_jax.mesh import make_mesh
from pshare_jax.server.compile_counter import CompileCounter

SCRIPT = Path(command.ROOT) / "benchmarks" / "device_check.py"
ABSENT = (
    *NAMES,
    "grain",
    "orbax",
    "torch",
    "transformers",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "httpx",
    "matplotlib",
)
BARE = """
import importlib.abc, runpy, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Blocker())
script, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    import pshare_jax
    print("the library is", pshare_jax.__file__)
""".replace("ABSENT", repr(set(ABSENT)))


def test_all_parts_run_on_a_bare_machine(tmp_path):
    """A checkout that is not installed, with JAX, flax and optax alone."""
    file = tmp_path / "folder" / "tiny.json"
    kept = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {name.upper(): str(jax.config.values[name]) for name in kept}
    # On a busy machine too, no part may be skipped.
    line = [sys.executable, "-W", "error", "-c", BARE, str(SCRIPT), "--tiny", "--minutes", "60", "--json", str(file)]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"the library is {SCRIPT.parents[1] / 'pshare_jax'}" in done.stdout
    results = json.loads(file.read_text())
    assert [part["part"] for part in results["parts"]] == list(command.PARTS)
    for part in results["parts"]:
        assert part["cells"], part
        assert not [cell for cell in (part, *part["cells"]) if {"error", "skipped"} & set(cell)]
    by_part = {part["part"]: part["cells"] for part in results["parts"]}
    assert {cell["compiled"] for cell in by_part["agents"][:2]} == {0}
    shared, isolated = by_part["agents"][:2]
    assert shared["calls"] == isolated["calls"] == shared["calls_of"]
    assert shared["prefilled"] < isolated["prefilled"]
    assert all(cell["share"] > 0 for name in ("prefill", "decode", "handoff") for cell in by_part[name])
    assert markdown(results) in done.stdout
    assert command.main(["--table", str(file)]) == 0


class Instant:
    """An engine that answers as soon as it is asked."""

    def __init__(self):
        self.asked = []

    def submit(self, request, on_event):
        self.asked.append(request.id)
        on_event(Event(token_id=1))
        on_event(Event(finish_reason="length"))


def test_agents_are_cut_after_their_time():
    sessions = [Session(f"s{number}", (Call("task", (1,), 1),) * 1000) for number in range(3)]
    engine: Any = Instant()
    agents.play(engine, sessions, 0.0)
    assert engine.asked == ["s0-0", "s1-0", "s2-0"]
    engine = Instant()
    played, _ = agents.play(engine, sessions, 600.0)
    assert [len(agent.answered) for agent in played] == [1000] * 3
    assert len(set(engine.asked)) == 3000


def test_an_accelerator_is_needed_for_models_of_full_size(capsys):
    assert command.main(["--parts", "peaks"]) == 2
    assert "--tiny" in capsys.readouterr().err


def check_with(seconds: float = 60.0, memory: int | None = None, said: list | None = None) -> Check:
    said = [] if said is None else said
    return Check(
        make_mesh([0]),
        "float32",
        sizes.TINY,
        Peaks(1e12, 1e9),
        memory,
        Clock(time.monotonic() + seconds),
        "tiny",
        sizes.shape("tiny"),
        said.append,
        lambda: None,
    )


def test_a_measurement_that_fails_is_kept_and_the_next_runs():
    check = check_with()

    def part(check: Check) -> None:
        check.measure("bad", lambda: {"value": 1 / 0})
        check.measure("good", lambda: {"value": 1.0})
        raise ValueError("the part itself")

    about = run_part(check, part, CompileCounter())
    bad, good = check.cells
    assert bad["error"][-1] == "ZeroDivisionError: division by zero"
    assert good == {"name": "good", "value": 1.0}
    assert about["error"][-1] == "ValueError: the part itself"


def test_what_does_not_fit_is_skipped_and_named():
    late = check_with(seconds=5)
    assert late.measure("late", lambda: {"value": 1.0}) is None
    assert late.cells == [{"name": "late", "skipped": "no time is left"}]
    # A part whose last measurement took longer than what is left.
    slow = check_with(seconds=60)
    slow.longest = 100.0
    assert slow.measure("slow", lambda: {"value": 1.0}) is None
    small = check_with(memory=1000)
    decode.run(small)
    assert [cell["name"] for cell in small.cells] == ["2 rows at 64"]
    assert "GiB of memory" in small.cells[0]["skipped"]


def test_a_failure_is_the_exit_status_and_is_in_the_file_at_once(tmp_path, monkeypatch, capsys):
    file, seen = tmp_path / "numbers.json", []

    def bad(check: Check) -> None:
        check.measure("bad", lambda: {"value": 1 / 0})

    def good(check: Check) -> None:
        seen.append(json.loads(file.read_text())["parts"][-1]["part"] if file.exists() else None)
        check.measure("good", lambda: check.timed(0.5, Work(1e12, 1.0)))

    monkeypatch.setattr(command, "PARTS", {"peaks": bad, "prefill": good})
    monkeypatch.setattr(jax.config, "update", lambda *arguments: None)
    assert command.main(["--tiny", "--parts", "peaks", "prefill", "--json", str(file)]) == 1
    first, second = json.loads(file.read_text())["parts"]
    assert first["cells"][0]["error"][-1].startswith("ZeroDivisionError")
    assert second["cells"][0]["ms"] == 500
    assert seen == ["peaks"]
    assert "bad: FAILED: ZeroDivisionError" in capsys.readouterr().out


def test_parts_after_the_end_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PARTS", {"peaks": lambda check: pytest.fail("no time is left for it")})
    monkeypatch.setattr(jax.config, "update", lambda *arguments: None)
    file = tmp_path / "numbers.json"
    assert command.main(["--tiny", "--minutes", "-1", "--json", str(file)]) == 0
    (part,) = json.loads(file.read_text())["parts"]
    assert part["skipped"] == "no time is left"
