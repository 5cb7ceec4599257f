"""Progress of a run: metrics as JSON lines and TensorBoard events, a progress bar or plain lines, and the loss figure.

The trainer calls `Reporter` from its own thread; `run.py` draws the figure at the end.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from pshare_jax.training.run_folder import RunFolder
from pshare_jax.training.trackers import Tracker

LINE_SECONDS = 10.0
"""Minimum time between two step lines without a terminal; the first and last step always have one."""


@dataclass(frozen=True)
class StepReport:
    """Metrics of a step. `step` counts from 1; `loss` is per target token, or per pair of answers; `tokens` are target
    tokens, `input_tokens` all tokens without padding; `correct` is the share of targets with the largest logit;
    `grad_norm` is before clipping; `epoch` counts from 0 and includes the fraction completed; `bad_steps` counts all
    steps not applied so far; `samples` is a hash of the step's sample names in order; `metrics` are the objective's own.
    """

    step: int
    loss: float
    tokens: int
    input_tokens: int
    correct: float
    grad_norm: float
    learning_rate: float
    seconds: float
    tokens_per_second: float
    epoch: float
    applied: bool
    bad_steps: int
    samples: str
    metrics: Mapping[str, float]


class Reporter:
    """Writes to the run's folder and to the console. Close it, or use it in a `with`."""

    def __init__(self, run: RunFolder, num_steps: int, done: int, console: Console, tracker: Tracker) -> None:
        """The run continues after step `done` of `num_steps`."""
        self._file = run.metrics.open("a", encoding="utf-8")
        # Discards the events that a killed run wrote after its last checkpoint.
        self._board = SummaryWriter(str(run.tensorboard), purge_step=done + 1)
        self._console, self._num_steps, self._first = console, num_steps, done + 1
        self._tracker = tracker
        self._first_done = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[summary]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=done, summary="")
        self._bar.start()

    def step(self, report: StepReport) -> None:
        """Records a step."""
        values = asdict(report)
        values |= values.pop("metrics")
        self._write(values)
        self._plot(report.step, {f"train/{name}": values[name] for name in values if name not in ("step", "samples")})
        summary = f"loss {report.loss:.4f}, {report.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=report.step, summary=summary)
        now = time.monotonic()
        if report.step == self._first:
            self._first_done = now
        due = now - self._last_line >= LINE_SECONDS or report.step in (self._first, self._num_steps)
        if not self._console.is_terminal and due:
            self.say(f"step {report.step}/{self._num_steps}, {summary}{self._eta(report.step, now)}")
            self._last_line = now
        if not report.applied:
            self.say(f"step {report.step} was skipped: its loss, gradient or update is not finite")

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Records an evaluation after `step`; all names start with eval_."""
        self._write({"step": step, **values})
        self._plot(step, {f"eval/{name.removeprefix('eval_')}": value for name, value in values.items()})
        summary = [f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4g}" for name, value in values.items()]
        self.say(f"evaluation after step {step}: {', '.join(summary)}")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Stops the bar and closes the files."""
        self._bar.stop()
        self._file.close()
        self._board.close()
        self._tracker.close()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _eta(self, step: int, now: float) -> str:
        # The first step includes compilation, so it does not predict the others.
        if step == self._first:
            return ""
        return f", ETA {_duration((now - self._first_done) / (step - self._first) * (self._num_steps - step))}"

    def _write(self, values: Mapping[str, Any]) -> None:
        # JSON has no NaN or infinity.
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def _plot(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)
        self._tracker.log(step, {name: float(value) for name, value in values.items()})


def draw_loss(metrics: Path, picture: Path) -> None:
    """Draws the training loss of each step, its running mean and the held-out losses; writes a PNG."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    # A loss that is not finite is null and has no point.
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, per step")
        axes.plot(steps, _running_mean(losses), color="C0", label="training, running mean")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o-", color="C1", label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.savefig(picture, dpi=150)


def _running_mean(losses: tuple[float, ...]) -> list[float]:
    """The mean over a window of a twentieth of the run around each step."""
    half = len(losses) // 40
    windows = (losses[max(0, at - half) : at + half + 1] for at in range(len(losses)))
    return [sum(window) / len(window) for window in windows]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
