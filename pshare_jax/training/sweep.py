"""A sweep: runs over a grid of optimizer and module keys in one process, which load the base once and share programs and data.

Each point of the grid is an ordinary run in a folder of its own below `output`. The sweep's results are sweep.json and sweep.png
there, and a table. `cli.py` calls `sweep`.
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pshare_jax.errors import PshareError
from pshare_jax.settings import with_values
from pshare_jax.training import run_folder
from pshare_jax.training.config import TrainConfig, check_train_config
from pshare_jax.training.run import Session, train
from pshare_jax.training.run_folder import RunFolder

SECTIONS = ("optimizer.", "module.")


@dataclass(frozen=True)
class Point:
    """A run of a sweep, and its values of the swept keys."""

    values: Mapping[str, Any]
    config: TrainConfig

    @property
    def run(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.config.output))

    @property
    def name(self) -> str:
        """The run's folder in the sweep's."""
        return self.run.root.name


def points_of(config: TrainConfig) -> list[Point]:
    """All points of `config.sweep`, the last key varying fastest.

    Raises:
        PshareError: a key that is not swept or does not exist, a value that it does not take, or a value twice.
    """
    for key, values in config.sweep.items():
        if not key.startswith(SECTIONS):
            raise PshareError(f"sweep has the key {key}, but only keys of optimizer and module are swept.")
        if not values or len(set(values)) < len(values):
            raise PshareError(f"sweep.{key} must list one value or more, each once.")
    points = []
    for values in itertools.product(*config.sweep.values()):
        chosen = dict(zip(config.sweep, values, strict=True))
        name = ",".join(f"{key}={_text(value)}" for key, value in chosen.items())
        point = with_values(replace(config, sweep={}), {**chosen, "output": str(Path(config.output) / name)})
        check_train_config(point)
        points.append(Point(chosen, point))
    if len({point.name for point in points}) < len(points):
        raise PshareError("Two points of sweep have the same folder; give their values other names.")
    return points


def _text(value: Any) -> str:
    return str(value).replace("/", "_")


def claim(config: TrainConfig, resume: bool) -> list[Point]:
    """The sweep's points, whose folders are checked and not modified.

    Raises:
        PshareError: as `points_of`; or a folder contains a run that this cannot be.
    """
    points = points_of(config)
    for point in points:
        run_folder.claim(point.config, resume and point.run.config.is_file())
    return points


def sweep(config: TrainConfig, *, resume: bool = False) -> list[dict[str, Any]]:
    """Trains all points, with `resume` those that are not complete, and writes and prints the results of the complete ones.

    Raises:
        PshareError: an error in config, base, data or a run folder.
    """
    points, session, console = claim(config, resume), Session(keep=True), Console()
    for number, point in enumerate(points, start=1):
        if not point.run.module.is_dir():
            console.print(f"run {number} of {len(points)}: {point.name}", markup=False, highlight=False)
            _, outcome = train(point.config, resume=resume and point.run.config.is_file(), session=session)
            if not outcome.finished:
                break
    root = Path(config.output)
    complete = [point for point in points if point.run.module.is_dir()]
    rows = [_row(point) for point in complete]
    (root / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n")
    if rows:
        _draw(complete, root / "sweep.png")
        console.print(_table(rows, list(config.sweep)))
    return rows


def _row(point: Point) -> dict[str, Any]:
    lines = _metrics(point)
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    held_out = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    last = losses[-math.ceil(len(losses) / 10) :]
    return {
        **point.values,
        "steps": max(line["step"] for line in lines),
        "training loss, mean of the last tenth": sum(last) / len(last) if last else None,
        "held-out loss": held_out[-1] if held_out else None,
        "seconds": round(sum(line["seconds"] for line in lines if "seconds" in line), 1),
        "module": str(point.run.module),
    }


def _metrics(point: Point) -> list[dict[str, Any]]:
    return [json.loads(line) for line in point.run.metrics.read_text().splitlines()]


def _table(rows: list[dict[str, Any]], keys: list[str]) -> Table:
    """Rows in the order of their loss, the best first."""
    shown = [*keys, "steps", "training loss, mean of the last tenth", "held-out loss", "seconds"]
    table = Table(*shown)
    for row in sorted(rows, key=_loss):
        table.add_row(
            *(f"{row[name]:.4f}" if "loss" in name and row[name] is not None else str(row[name]) for name in shown)
        )
    return table


def _loss(row: Mapping[str, Any]) -> float:
    loss = row["held-out loss"] if row["held-out loss"] is not None else row["training loss, mean of the last tenth"]
    return math.inf if loss is None else loss


def _draw(points: list[Point], picture: Path) -> None:
    """The held-out losses of all runs over their steps; without held-out data the training losses."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    metrics = {point.name: _metrics(point) for point in points}
    name = "eval_loss" if any("eval_loss" in line for lines in metrics.values() for line in lines) else "loss"
    for label, lines in metrics.items():
        found = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axes.plot(*zip(*found, strict=True), "o-" if name == "eval_loss" else "-", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(f"{'held-out' if name == 'eval_loss' else 'training'} loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(picture, dpi=150)
