"""What a run tells while it runs: JSON lines, TensorBoard, and a progress bar or, where there is no terminal, plain lines."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from pshare_jax.training.run_folder import RunFolder

LINE_SECONDS = 10.0
"""Where there is no terminal: at most one line in this time, and the first and last step's."""


@dataclass(frozen=True)
class StepReport:
    """One step. `step` counts from 1; `loss` is per target token; `tokens` are target tokens, `input_tokens` all that were
    read, padding apart; `correct` is the share of targets that the argmax hits; `grad_norm` is before clipping; `epoch`
    counts from 0 and has the share of it that is done; `bad_steps` are those not applied so far; `samples` is a hash of the
    names of the step's samples in order.
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


class Reporter:
    """Writes into the run's folder and onto the console. Close it, or use it in a `with`."""

    def __init__(self, run: RunFolder, num_steps: int, done: int, console: Console) -> None:
        """`done` of `num_steps` steps are done already."""
        self._file = run.metrics.open("a", encoding="utf-8")
        # Events that a killed run wrote beyond its checkpoint are taken back.
        self._board = SummaryWriter(str(run.tensorboard), purge_step=done + 1)
        self._console, self._num_steps, self._first = console, num_steps, done + 1
        self._first_done = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_steps, completed=done, told="")
        self._bar.start()

    def step(self, report: StepReport) -> None:
        """Writes and shows a step."""
        values = asdict(report)
        self._write(values)
        self._plot(report.step, {f"train/{name}": values[name] for name in values if name not in ("step", "samples")})
        told = f"loss {report.loss:.4f}, {report.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=report.step, told=told)
        now = time.monotonic()
        if report.step == self._first:
            self._first_done = now
        due = now - self._last_line >= LINE_SECONDS or report.step in (self._first, self._num_steps)
        if not self._console.is_terminal and due:
            self.say(f"step {report.step}/{self._num_steps}, {told}{self._eta(report.step, now)}")
            self._last_line = now
        if not report.applied:
            self.say(f"step {report.step} was not applied: its loss or gradient is not finite")

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and shows an evaluation of the module after `step`; all names start with eval_."""
        self._write({"step": step, **values})
        self._plot(step, {f"eval/{name.removeprefix('eval_')}": value for name, value in values.items()})
        told = ", ".join(
            f"{name.removeprefix('eval_').replace('_', ' ')} {value:.4g}" for name, value in values.items()
        )
        self.say(f"evaluation after step {step}: {told}")

    def say(self, line: str) -> None:
        """A line for people, above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Ends the bar and the files."""
        self._bar.stop()
        self._file.close()
        self._board.close()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _eta(self, step: int, now: float) -> str:
        # The first step compiles: it says nothing of the others.
        if step == self._first:
            return ""
        return f", ETA {_duration((now - self._first_done) / (step - self._first) * (self._num_steps - step))}"

    def _write(self, values: Mapping[str, Any]) -> None:
        # JSON has no NaN.
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def _plot(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, float(value), step)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
