"""Experiment trackers beside TensorBoard: Weights & Biases or trackio, imported only if the config names them.

`run.py` starts the tracker and `Reporter` calls it. A tracker that fails is reported once and then left alone: no run ends
for it.
"""

import importlib
import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.training.config import TrainConfig

PROJECT = "pshare_jax"
"""The project of the runs; W&B's variable WANDB_PROJECT gives another."""
ID_FILE = "tracker_id"
"""A file of the run folder, so that a resumed run goes on as the same run, also in a moved folder."""


def check_tracker(config: TrainConfig) -> None:
    """Checks that the tracker's package is installed.

    Raises:
        PshareError: it is not.
    """
    name = config.tracker
    if name != "none" and importlib.util.find_spec(name) is None:
        raise PshareError(f"tracker: {name} needs the package {name}; pip install {name}, or set tracker: none.")


class Tracker:
    """A run in the tracker that `config` names, which may be none. `say` prints the line about a failure."""

    def __init__(self, config: TrainConfig, root: Path, say: Callable[[str], None]) -> None:
        """Starts the run of the folder `root`, or goes on with it."""
        self._name, self._say = config.tracker, say
        self._module: Any = None
        if self._name != "none":
            self._guarded(lambda: self._start(config, root))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records metrics of a step."""
        if self._module is not None:
            self._guarded(lambda: self._module.log(dict(values), step=step))

    def close(self) -> None:
        """Ends the run in the tracker."""
        if self._module is not None:
            self._guarded(lambda: self._module.finish())
        self._module = None

    def _start(self, config: TrainConfig, root: Path) -> None:
        module = importlib.import_module(self._name)
        file = root / ID_FILE
        if not file.exists():
            file.write_text(f"{root.resolve().name}-{secrets.token_hex(4)}\n")
        name = file.read_text().strip()
        options: dict[str, Any] = {"name": name, "config": asdict(config), "resume": "allow"}
        if self._name == "wandb":
            options |= {"id": name, "dir": str(root)}
        if self._name != "wandb" or "WANDB_PROJECT" not in os.environ:
            options["project"] = PROJECT
        module.init(**options)
        self._module = module

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._module = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self._say(f"the tracker {self._name} failed and gets no further metrics: {reason}")
