"""Sweeps: each point is the run that it would be alone, the base is loaded once, and complete points are not trained again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import FULL, assert_same_steps, make_base_and_data, metrics, run_config, stop_after

import pshare_jax.training.run as run_module
from pshare_jax.errors import PshareError
from pshare_jax.settings import to_yaml
from pshare_jax.training import cli
from pshare_jax.training.run import train
from pshare_jax.training.sweep import points_of, sweep

GRID = {"optimizer.learning_rate": [1e-3, 3e-3], "module.rank": [2, 3]}


@pytest.fixture(scope="module")
def base_and_data(tmp_path_factory):
    return make_base_and_data(tmp_path_factory.mktemp("base_and_data"), num_layers=1)


def config_of(base_and_data, output, **changes):
    return run_config(base_and_data, output, **{"steps": 4, "sweep": GRID, **changes})


def counted(monkeypatch, name):
    """Counts the calls of a function of run.py."""
    calls, function = [], getattr(run_module, name)

    def count(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(run_module, name, count)
    return calls


def test_a_sweep_is_its_runs_on_one_base(base_and_data, tmp_path, monkeypatch, capsys):
    config = config_of(base_and_data, tmp_path / "sweep")
    loads, compiled = counted(monkeypatch, "load"), counted(monkeypatch, "loss_steps")
    rows = sweep(config)
    # One program of gradients for each rank.
    assert (len(loads), len(compiled)) == (1, 2)
    points = points_of(config)
    assert [point.name for point in points] == [
        f"optimizer.learning_rate={rate},module.rank={rank}" for rate in (0.001, 0.003) for rank in (2, 3)
    ]
    for point, row in zip(points, rows, strict=True):
        alone = replace(point.config, output=str(tmp_path / "alone" / point.name))
        train(alone)
        assert_same_steps(metrics(point.config.output), metrics(alone.output))
        adapters = [Path(one.output) / "module" / "adapter_model.safetensors" for one in (point.config, alone)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
        assert {key: row[key] for key in GRID} == dict(point.values)
        assert row["held-out loss"] > 0
        assert (row["steps"], Path(row["module"]).is_dir()) == (4, True)
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == rows
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 1000
    # The table has the best first.
    best = min(rows, key=lambda row: row["held-out loss"])
    table = capsys.readouterr().out.split("held-out")[-1]
    first = next(line for line in table.splitlines() if "0.00" in line and "│" in line)
    assert f"{best['held-out loss']:.4f}" in first


def test_full_modules_share_the_base_and_leave_it(base_and_data, tmp_path):
    """Each run begins with the base's weights, also full fine-tuning, which a run alone frees."""
    rates = {"optimizer.learning_rate": [1e-3, 2e-3]}
    for method in ("full_ft", "prefillshare"):
        config = config_of(base_and_data, tmp_path / method, sweep=rates, method=method, module=FULL, steps=2)
        sweep(config)
        first, second = (metrics(point.config.output) for point in points_of(config))
        assert first[0]["loss"] == second[0]["loss"]
        assert first[1]["loss"] != second[1]["loss"]


def test_a_stopped_sweep_goes_on_where_it_was(base_and_data, tmp_path, monkeypatch):
    config = config_of(base_and_data, tmp_path / "sweep", sweep={"optimizer.learning_rate": [1e-3, 3e-3]})
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert sweep(config) == []
    with pytest.raises(PshareError, match="--resume"):
        sweep(config)
    loads = counted(monkeypatch, "load")
    rows = sweep(config, resume=True)
    assert [row["steps"] for row in rows] == [4, 4]
    whole = config_of(base_and_data, tmp_path / "whole", sweep=config.sweep)
    sweep(whole)
    for ours, theirs in zip(points_of(config), points_of(whole), strict=True):
        assert_same_steps(metrics(ours.config.output), metrics(theirs.config.output))
    # Nothing is left to do.
    loads.clear()
    assert sweep(config, resume=True) == rows
    assert not loads


@pytest.mark.parametrize(
    ("grid", "facts"),
    [
        ({"data.max_len": [64]}, ["data.max_len", "optimizer and module"]),
        ({"optimizer.learning_rat": [1e-3]}, ["optimizer.learning_rat"]),
        ({"optimizer.learning_rate": []}, ["optimizer.learning_rate", "one value"]),
        ({"optimizer.learning_rate": [1e-3, 1e-3]}, ["optimizer.learning_rate", "once"]),
        ({"optimizer.learning_rate": ["fast"]}, ["optimizer.learning_rate", "fast"]),
        ({"module.rank": [4, 0]}, ["module.rank", "at least 1"]),
    ],
)
def test_a_wrong_grid_is_one_sentence_before_anything_starts(base_and_data, tmp_path, capsys, grid, facts):
    config = config_of(base_and_data, tmp_path / "sweep", sweep=grid)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert cli.main(["--config", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert all(fact in error for fact in facts), error
    assert error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_describes_one_run(base_and_data, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(config_of(base_and_data, tmp_path / "sweep")))
    assert cli.main(["--config", str(tmp_path / "config.yaml"), "--dry-run"]) == 2
    assert "leave out sweep" in capsys.readouterr().err
