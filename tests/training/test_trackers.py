"""Trackers beside TensorBoard: they get the run's metrics, are imported only if named, and never end a run.

`wandb` and `trackio` are modules of the test, which note their calls; the last test needs the real W&B.
"""

import importlib
import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_runs import all_metrics, make_base_and_data, run_config

from pshare_jax.errors import PshareError
from pshare_jax.settings import to_yaml
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.run import train
from pshare_jax.training.trackers import ID_FILE, Tracker, check_tracker

NOTING = """
calls = []

def init(**options):
    calls.append(("init", options))

def log(values, step):
    calls.append(("log", step, values))

def finish():
    calls.append(("finish",))
"""
FAILING = {
    "import": "raise RuntimeError('broken at import')",
    "init": f"{NOTING}\ndef init(**options): raise RuntimeError('broken at init\\nwith a second line')",
    "log": f"{NOTING}\ndef log(values, step): raise OSError('broken at log')",
    "finish": f"{NOTING}\ndef finish(): raise ValueError",
}


@pytest.fixture(scope="module")
def base_and_data(tmp_path_factory):
    return make_base_and_data(tmp_path_factory.mktemp("base_and_data"), num_layers=1)


def installed(monkeypatch, root: Path, name: str, code: str) -> None:
    """A module of this name that Python finds first."""
    folder = root / "site"
    folder.mkdir()
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def calls_of(name: str) -> list[Any]:
    module: Any = sys.modules[name]
    return module.calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_all_metrics_arrive_and_a_resumed_run_is_the_same(name, base_and_data, tmp_path, monkeypatch):
    installed(monkeypatch, tmp_path, name, NOTING)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config = run_config(base_and_data, tmp_path / "run", tracker=name, steps=4)
    train(config)
    # Also in another folder.
    (tmp_path / "run").rename(tmp_path / "moved")
    train(replace(config, output=str(tmp_path / "moved"), steps=6), resume=True)
    calls = calls_of(name)
    (_, first), (_, second) = (call for call in calls if call[0] == "init")
    assert [call[0] for call in calls].count("finish") == 2
    assert first["config"]["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    assert (first["project"], first["resume"]) == ("pshare_jax", "allow")
    assert first["name"] == second["name"] == (tmp_path / "moved" / ID_FILE).read_text().strip()
    assert first["name"].startswith("run-")
    assert (first.get("id"), second.get("id")) == ((first["name"],) * 2 if name == "wandb" else (None, None))
    logged = {
        (step, key): value
        for _, step, values in (call for call in calls if call[0] == "log")
        for key, value in values.items()
    }
    lines = all_metrics(tmp_path / "moved")
    assert {step for step, _ in logged} == set(range(1, 7))
    for line in lines:
        for key, group in (("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("eval_loss", "eval/loss")):
            if key in line:
                assert logged[line["step"], group] == line[key]
    assert all(isinstance(value, float) and math.isfinite(value) for value in logged.values())


def test_wandbs_own_variable_names_the_project(tmp_path, monkeypatch):
    installed(monkeypatch, tmp_path, "wandb", NOTING)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    Tracker(config_of("wandb"), tmp_path, print).close()
    assert "project" not in calls_of("wandb")[0][1]


def config_of(tracker: Any) -> TrainConfig:
    return TrainConfig("base", DataConfig([SourceConfig("a.jsonl")]), "out", tracker=tracker)


@pytest.mark.parametrize("where", FAILING)
def test_a_failing_tracker_is_told_once_and_changes_nothing(where, base_and_data, tmp_path, monkeypatch, capsys):
    installed(monkeypatch, tmp_path, "trackio", FAILING[where])
    _, outcome = train(run_config(base_and_data, tmp_path / "run", tracker="trackio", steps=4))
    assert outcome.finished
    assert (tmp_path / "run" / "module").is_dir()
    told = [line for line in capsys.readouterr().out.splitlines() if "the tracker trackio failed" in line]
    assert len(told) == 1
    assert told[0].endswith("ValueError" if where == "finish" else f"broken at {where}")


def test_a_missing_package_is_one_sentence_before_anything_is_written(base_and_data, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = run_config(base_and_data, tmp_path / "run", tracker="wandb")
    with pytest.raises(PshareError, match=r"tracker: wandb needs the package wandb; .*set tracker: none\.$"):
        train(config)
    assert not (tmp_path / "run").exists()
    check_tracker(replace(config, tracker="none"))


def test_no_tracker_is_imported_unless_it_is_named(tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, Untouched(name))
    tracker = Tracker(config_of("none"), tmp_path, print)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


class Untouched(ModuleType):
    """A module that nothing may use."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{self.__name__}.{name} was used")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_offline(base_and_data, tmp_path):
    """The real one, in a process of its own: without a network it keeps the run in the run's folder."""
    config = run_config(base_and_data, tmp_path / "run", tracker="wandb", steps=3)
    code = (
        "import sys; from pshare_jax.settings import load_settings; from pshare_jax.training.config import TrainConfig; "
        "from pshare_jax.training.run import train; train(load_settings(TrainConfig, sys.argv[1]))"
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    environment = {
        "WANDB_MODE": "offline",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
