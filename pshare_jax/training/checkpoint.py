"""Checkpoints of a run, by orbax: all of one step boundary, written in the background, complete or ignored.

One holds the trained parameters, the optimizer's state, and a small JSON of counters with the place in the data. The base
is in none. A folder becomes a checkpoint by a rename at the end of the save, so one that a kill cut short is not seen.
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
    """Where a run is, as plain values: steps done, the data's place (`Batches.get_state`), target tokens trained, the
    base's fingerprint, and the held-out loss where it was measured at this step.
    """

    step: int
    data: dict[str, Any]
    tokens: int
    base: str
    eval_loss: float | None = None


class Checkpoints:
    """The checkpoints below `folder`. Close it, or use it in a `with`: a save may still be under way."""

    def __init__(self, folder: Path, config: CheckpointConfig | None = None) -> None:
        """Without a config nothing is written and nothing deleted."""
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
        """The step of the checkpoint with the lowest held-out loss, if any has one."""
        return _best(self._eval_losses, self.steps)

    @property
    def best_loss(self) -> float | None:
        """The held-out loss of the best checkpoint."""
        return None if self.best is None else self._eval_losses[self.best]

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves in the background, unless that step is saved; `state` may be donated as soon as this returns."""
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
        """The plain values of a checkpoint."""
        content = self._plain(step)
        return Progress(**{name: value for name, value in content.items() if name not in _COUNTERS})

    def applied(self, step: int) -> int:
        """How many of a checkpoint's steps were applied."""
        return self._plain(step)["applied"]

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state at `step`, in the shapes, dtypes and shardings of `like`, on whatever mesh it was saved.

        `like` may hold `ShapeDtypeStruct`s, and should: its arrays would only take memory beside the restored ones.
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
        """The trained parameters alone."""
        items = ocp.args.Composite(trainable=ocp.args.StandardRestore(_abstract(dict(like))))
        return self._restored(step, items)["trainable"]

    def wait(self) -> None:
        """Until all that was saved is complete on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends orbax's threads."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong in the background comes up with the next save or wait."""
        try:
            yield
        except (OSError, ValueError) as error:
            # What tensorstore says ends with the system's reason, behind a chain of files.
            told = str(error).strip().split("\n")[0].rsplit(": ", 1)[-1].split(" [")[0]
            reason = getattr(error, "strerror", None) or told
            raise PshareError(f"A checkpoint cannot be written to {self._folder}: {reason}.") from error

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
            raise PshareError(f"The checkpoint {self._folder / str(step)} cannot be read: {reason}") from error


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


class _LatestAndBest:
    """Which checkpoints stay; orbax asks before and after saves."""

    def __init__(self, eval_losses: Mapping[int, float | None], config: CheckpointConfig) -> None:
        self._eval_losses, self._config = eval_losses, config

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """In the order of `checkpoints`."""
        steps = [one.step for one in checkpoints]
        kept: set[int | None] = {*sorted(steps)[-self._config.keep :]}
        if self._config.keep_best:
            kept.add(_best(self._eval_losses, steps))
        return [step in kept for step in steps]


def _best(eval_losses: Mapping[int, float | None], steps: Iterable[int]) -> int | None:
    losses = {step: loss for step in steps if (loss := eval_losses.get(step)) is not None}
    return min(losses, key=losses.__getitem__) if losses else None
