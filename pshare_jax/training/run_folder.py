"""The folder of a run: what lies where in it, who may start in it, and what a resumed run takes back.

config.yaml      the resolved config
data_report.txt  what became of every record of the data
metrics.jsonl    one JSON object a step, and one an evaluation
tensorboard/     the same as TensorBoard event files
checkpoints/     step by step, for --resume and pshare-export
loss.png         the loss over the steps
module/          the trained decode module
.lock            held by the process that trains in it
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings, to_yaml
from pshare_jax.training.config import TrainConfig, changed_keys


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config; a folder that has it holds a run."""
        return self.root / "config.yaml"

    @property
    def data_report(self) -> Path:
        """The data's report."""
        return self.root / "data_report.txt"

    @property
    def metrics(self) -> Path:
        """JSON lines."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Orbax's folder."""
        return self.root / "checkpoints"

    @property
    def loss_figure(self) -> Path:
        """The figure."""
        return self.root / "loss.png"

    @property
    def module(self) -> Path:
        """The result."""
        return self.root / "module"

    def read_config(self) -> TrainConfig:
        """The config of the run in this folder.

        Raises:
            PshareError: there is none.
        """
        if not self.config.is_file():
            raise PshareError(f"There is no run in {self.root}: it has no {self.config.name}.")
        return load_settings(TrainConfig, self.config)


def claim(config: TrainConfig, resume: bool) -> RunFolder:
    """The folder that `config` runs in, looked at but not touched.

    Raises:
        PshareError: it holds a run and `resume` is not asked for, or it holds none or another and it is.
    """
    run = RunFolder(Path(config.output))
    if resume:
        if not run.config.is_file():
            raise PshareError(f"There is no run in {run.root} to resume; start it without --resume.")
        changed = changed_keys(config, run.read_config())
        if changed:
            raise PshareError(
                f"The run in {run.root} was started with another {', '.join(changed)}; resume it as it was, or give "
                "another output."
            )
    elif run.config.exists():
        raise PshareError(f"{run.root} already holds a run; go on with --resume, or give another output.")
    return run


@contextmanager
def held(run: RunFolder) -> Iterator[None]:
    """Makes the folder and keeps other processes from training in it, until the end of the `with` or of this process.

    Raises:
        PshareError: another process trains in it, or it cannot be written to.
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
                f"Another process trains in {run.root}; wait for its end, or give another output."
            ) from None
        except OSError as error:
            raise _cannot_write(run, error) from None
        yield


def start(run: RunFolder, config: TrainConfig, data_report: str, step: int) -> None:
    """Makes it the folder of a run that goes on after `step`: config and data report are there, later metrics gone.

    Raises:
        PshareError: it cannot be written to.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        _forget_after(run.metrics, step)
        _write(run.data_report, data_report)
        _write(run.config, to_yaml(config))
    except OSError as error:
        raise _cannot_write(run, error) from None


def _cannot_write(run: RunFolder, error: OSError) -> PshareError:
    return PshareError(f"Cannot write to the run folder {run.root}: {error.strerror or error}.")


def _forget_after(metrics: Path, step: int) -> None:
    """Takes the lines of later steps than `step` out of the metrics: a resumed run writes them again."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            # A kill may have cut the last line short.
            continue
    _write(metrics, "".join(f"{line}\n" for line in kept))


def _write(path: Path, text: str) -> None:
    """The whole text or the old file, whenever the process is killed."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
