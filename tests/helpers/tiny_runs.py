"""Shared by the tests of training runs: a tiny base with data, configs, and runs that are stopped or killed at a step."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_folder
from training_data import chat, write_jsonl

import pshare_jax.training.run as run_module
from pshare_jax.settings import to_yaml
from pshare_jax.training.config import CheckpointConfig, EvaluationConfig, ModuleConfig, OptimizerConfig, TrainConfig
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig

ROOT = Path(__file__).parents[2]
LORA = ModuleConfig("lora", rank=3, alpha=6.0, targets=("q", "v", "down"), dropout=0.0)
FULL = ModuleConfig("full")

# pshare-train that kills itself right after the save of step argv[1] has started in the background (argv[2] True), or when the
# next step is reported.
KILLED = """
import os, signal, sys
from pshare_jax.training import cli
from pshare_jax.training.checkpoint import Checkpoints
from pshare_jax.training.progress import Reporter
step, in_save = int(sys.argv[1]), sys.argv[2] == "True"
def dying(method, at):
    def call(self, *values):
        method(self, *values)
        if values[-1].step == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return call
if in_save:
    Checkpoints.save = dying(Checkpoints.save, step)
else:
    Reporter.step = dying(Reporter.step, step + 1)
sys.exit(cli.main(sys.argv[3:]))
"""


def make_base_and_data(root: Path, num_layers: int = 2, records: int = 19) -> tuple[Path, str]:
    """A tiny base and a data file with one and two answers a record."""
    base = tiny_folder("llama", root / "base", num_hidden_layers=num_layers)
    rng = np.random.default_rng(3)
    lines = []
    for index in range(records):
        a, b = rng.integers(0, 10 ** rng.integers(1, 6, 2)).tolist()
        talk = [f"{a} plus {b}?", str(a + b)] + ([f"and {index} more?", str(a + b + index)] if index % 3 else [])
        lines.append({"messages": chat(*talk)})
    return base, write_jsonl(root / "data.jsonl", lines)


def run_config(base_and_data: tuple[Path, str], output: Path, **changes: Any) -> TrainConfig:
    """Three epochs of few packed batches, two per step, with held-out records."""
    base, path = base_and_data
    data = DataConfig([SourceConfig(path)], epochs=3, eval_fraction=0.2, batch=RowsConfig(rows=2, context_len=64))
    config = TrainConfig(
        base=str(base),
        data=data,
        output=str(output),
        module=LORA,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        accumulation=2,
        checkpoint=CheckpointConfig(every=2, keep=2),
        evaluation=EvaluationConfig(every=3),
    )
    return replace(config, **changes)


def metrics(output: str | Path) -> list[dict]:
    """The metrics of a run's steps."""
    return [line for line in all_metrics(output) if "loss" in line]


def all_metrics(output: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(ours: list[dict], theirs: list[dict]) -> None:
    """Same samples in the same order, and the same losses."""
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    for name in ("loss", "grad_norm", "learning_rate", "correct", "epoch"):
        np.testing.assert_allclose([x[name] for x in ours], [x[name] for x in theirs], rtol=1e-6, err_msg=name)


def stop_after(monkeypatch, step: int) -> None:
    """Sends SIGTERM to this process when `step` is reported."""
    report = run_module.Reporter.step

    def step_and_stop(self, values):
        report(self, values)
        if values.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_module.Reporter, "step", step_and_stop)


def killed(config: TrainConfig, tmp_path: Path, step: int, in_save: bool) -> subprocess.CompletedProcess:
    """pshare-train in a process that is killed during the save after `step`, or at the end of the next step.

    Its pipes close only after its workers have ended, so a worker that survives is a timeout.
    """
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    return _run(tmp_path, KILLED, str(step), str(in_save), "--config", str(path))


def exported_alone(run: Path, output: Path) -> subprocess.CompletedProcess:
    """pshare-export in a process with one device."""
    code = "import sys; from pshare_jax.training.cli import export_main; sys.exit(export_main())"
    return _run(output.parent, code, "--run", str(run), "--output", str(output))


def _run(tmp_path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def moments(state: Any) -> Any:
    """Adam's `mu` and `nu`."""
    return state.optimizer[0]
