"""Checkpoints of a run, by orbax, taken between two steps and written in the background.

A checkpoint holds the trainable parameters, the optimizer state, and JSON with counters and the position in the data;
never the base. A rename completes the save, so that an interrupted save is not listed. Only the trainer's thread calls
this.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Params
from pshare_jax.training.config import CheckpointConfig
from pshare_jax.training.step.steps import TrainState

_COUNTERS = ("applied", "bad", "all_bad")


@dataclass(frozen=True)
class Progress:
    """Position of a run in plain values: steps done, state of the data (`Batches.get_state`), target tokens trained,
    the base's fingerprint, and the held-out loss if it was measured at this step.
    """

    step: int
    data: dict[str, Any]
    tokens: int
    base: str
    eval_loss: float | None = None


class Checkpoints:
    """The checkpoints in `folder`. Close it, or use it in a `with`: a save may be in progress."""

    def __init__(self, folder: Path, config: CheckpointConfig | None = None) -> None:
        """Read-only without a config."""
        self._eval_losses: dict[int, float | None] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(self._eval_losses, config or CheckpointConfig()),
            cleanup_tmp_directories=config is not None,
            create=config is not None,
            save_root_metadata=False,
        )
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._eval_losses.update({step: self.progress(step).eval_loss for step in self.steps})

    @property
    def steps(self) -> list[int]:
        """Steps of complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the lowest held-out loss; None if no checkpoint has one."""
        return _best(self._eval_losses, self.steps)

    @property
    def best_loss(self) -> float | None:
        """The held-out loss of the best checkpoint."""
        return None if self.best is None else self._eval_losses[self.best]

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves in the background unless the step exists; `state` may be donated once this returns."""
        if progress.step in self._manager.all_steps():
            return
        counters = {name: int(getattr(state, name)) for name in _COUNTERS}
        items = ocp.args.Composite(
            trainable=ocp.args.StandardSave(state.trainable),
            optimizer=ocp.args.StandardSave(state.optimizer),
            progress=ocp.args.JsonSave({**progress.__dict__, **counters}),
        )
        self._eval_losses[progress.step] = progress.eval_loss
        with self._writing():
            self._manager.save(progress.step, args=items)

    def progress(self, step: int) -> Progress:
        """The `Progress` of a checkpoint."""
        content = self._plain(step)
        return Progress(**{name: value for name, value in content.items() if name not in _COUNTERS})

    def applied(self, step: int) -> int:
        """Number of applied steps up to a checkpoint."""
        return self._plain(step)["applied"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step` in the shapes, dtypes and shardings of `like`, whatever the mesh that saved it.

        `like` should hold `ShapeDtypeStruct`s, since arrays would take memory beside the restored arrays.
        """
        items = ocp.args.Composite(
            trainable=ocp.args.StandardRestore(_abstract(like.trainable)),
            optimizer=ocp.args.StandardRestore(_abstract(like.optimizer)),
        )
        restored = self._restored(step, items)
        content = self._plain(step)
        counters = {
            name: jax.device_put(jax.numpy.int32(content[name]), getattr(like, name).sharding) for name in _COUNTERS
        }
        return TrainState(restored["trainable"], restored["optimizer"], **counters)

    def restore_trainable(self, step: int, like: Mapping[str, jax.ShapeDtypeStruct | jax.Array]) -> Params:
        """The trainable parameters at `step`."""
        items = ocp.args.Composite(trainable=ocp.args.StandardRestore(_abstract(dict(like))))
        return self._restored(step, items)["trainable"]

    def wait(self) -> None:
        """Blocks until all saves are complete on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for all saves and ends orbax's threads."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns errors of a background save, which orbax raises at the next call, into a `PshareError`."""
        try:
            yield
        except (OSError, ValueError) as error:
            # tensorstore's message ends with the system's reason, after a chain of file names.
            last_part = str(error).strip().split("\n")[0].rsplit(": ", 1)[-1].split(" [")[0]
            reason = getattr(error, "strerror", None) or last_part
            raise PshareError(f"Cannot write a checkpoint to {self._folder}: {reason}.") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _plain(self, step: int) -> dict[str, Any]:
        return self._restored(step, ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

    def _restored(self, step: int, items: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise PshareError(f"Cannot read the checkpoint {self._folder / str(step)}: {reason}") from error


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class _LatestAndBest:
    """Orbax's preservation policy: the latest checkpoints and the best."""

    def __init__(self, eval_losses: Mapping[int, float | None], config: CheckpointConfig) -> None:
        self._eval_losses, self._config = eval_losses, config

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether to keep each of `checkpoints`."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept: set[int | None] = {*sorted(steps)[-self._config.keep :]}
        if self._config.keep_best:
            kept.add(_best(self._eval_losses, steps))
        return [step in kept for step in steps]


def _best(eval_losses: Mapping[int, float | None], steps: Iterable[int]) -> int | None:
    losses = {step: loss for step in steps if (loss := eval_losses.get(step)) is not None}
    return min(losses, key=losses.__getitem__) if losses else None
