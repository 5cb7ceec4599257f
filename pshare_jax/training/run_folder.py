"""The run folder: its files, which run may use it, and what a resumed run removes.

config.yaml      the resolved config
data_report.txt  how many records of each source were used or dropped, and why
metrics.jsonl    one JSON object per step and per evaluation
tensorboard/     the same as TensorBoard event files
checkpoints/     one folder per step, for --resume and pshare-export
loss.png         the loss over the steps
module/          the trained decode module
tracker_id       the run's name in a tracker, if the config names one
.lock            locked by the process that trains
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings, to_yaml
from pshare_jax.training.config import TrainConfig, changed_keys


class RunFolder:
    """Paths of a run. A folder with a `config` file contains a run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.data_report = root / "data_report.txt"
        self.metrics = root / "metrics.jsonl"
        self.tensorboard = root / "tensorboard"
        self.checkpoints = root / "checkpoints"
        self.loss_figure = root / "loss.png"
        self.module = root / "module"

    def read_config(self) -> TrainConfig:
        """The config of the run.

        Raises:
            PshareError: the folder contains no run.
        """
        if not self.config.is_file():
            raise PshareError(
                f"{self.root} is not a run folder: it has no {self.config.name}; give the output of a run."
            )
        return load_settings(TrainConfig, self.config)


def claim(config: TrainConfig, resume: bool) -> tuple[RunFolder, TrainConfig]:
    """The run folder of `config`, checked and not modified, and the config with the run's clock and chat template: those
    of its start.

    Raises:
        PshareError: without `resume`, the folder contains a run; with it, no run or a run with another config.
    """
    run = RunFolder(Path(config.output))
    if resume:
        if not run.config.is_file():
            raise PshareError(f"{run.root} contains no run to resume; start without --resume.")
        before = run.read_config()
        config = _fixed(config, before.data.clock)
        changed = changed_keys(config, before)
        if changed:
            raise PshareError(
                f"The run in {run.root} was started with another {', '.join(changed)}; resume with the original value, "
                "or give another output."
            )
    elif run.config.exists():
        raise PshareError(f"{run.root} already contains a run; add --resume, or give another output.")
    else:
        config = _fixed(config, datetime.now().isoformat(timespec="seconds"))
    return run, config


def _fixed(config: TrainConfig, clock: str | None) -> TrainConfig:
    """`config` with this clock, unless it has one, and with the text of its chat template, whose file may change."""
    module = replace(config.module, chat_template=config.module.style.template)
    return replace(config, module=module, data=replace(config.data, clock=config.data.clock or clock))


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Creates the folder and locks it against other training processes until the end of the `with` or of this process.

    Raises:
        PshareError: another process holds the lock, or the folder cannot be written.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        file = (run.root / ".lock").open("w")
    except OSError as error:
        raise _cannot_write(run, error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PshareError(
                f"Another process is training in {run.root}; wait until it ends, or give another output."
            ) from None
        except OSError as error:
            raise _cannot_write(run, error) from None
        yield


def start(run: RunFolder, config: TrainConfig, data_report: str, step: int) -> None:
    """Writes config and data report and removes the metrics of steps after `step`.

    Raises:
        PshareError: the folder cannot be written.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        _truncate(run.metrics, step)
        _write(run.data_report, data_report)
        _write(run.config, to_yaml(config))
    except OSError as error:
        raise _cannot_write(run, error) from None


def _cannot_write(run: RunFolder, error: OSError) -> PshareError:
    return PshareError(f"Cannot write to the run folder {run.root}: {error.strerror or error}.")


def _truncate(metrics: Path, step: int) -> None:
    """Removes the lines of steps after `step`, which a resumed run writes again."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            # A killed run may leave an incomplete last line.
            continue
    _write(metrics, "".join(f"{line}\n" for line in kept))


def _write(path: Path, text: str) -> None:
    """Replaces the file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
