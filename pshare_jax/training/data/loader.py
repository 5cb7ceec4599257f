"""The data loader: a grain data set of batches, built in worker processes or in this process, with exact resume.

The trainer has one `Batches` for training and one for each evaluation, and saves `get_state()` in its checkpoints. A
batch is a function of its position (`epochs.py`), so a run may resume with another number of workers.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from pshare_jax.errors import PshareError
from pshare_jax.training.data.batches import Layout
from pshare_jax.training.data.config import DataConfig
from pshare_jax.training.data.epochs import Batch, Epochs, members_of, sample_lengths
from pshare_jax.training.data.packing import choose_capacity
from pshare_jax.training.data.prepare import SampleSet
from pshare_jax.training.processes import exit_with_parent

# grain needs a length; no run is that long.
_ENDLESS = 2**62
_BUFFERED_BATCHES = 2


def row_capacity(samples: SampleSet, config: DataConfig, layout: Layout) -> tuple[int, int]:
    """Context and answer length of a row: the config's, or chosen for `samples`."""
    lengths = sample_lengths(samples, layout)[members_of(samples)]
    return choose_capacity(lengths, config.batch.context_len, config.batch.answer_len)


def training_batches(samples: SampleSet, config: DataConfig, layout: Layout) -> "Batches":
    """Shuffled batches for `config.epochs` epochs."""
    capacity = row_capacity(samples, config, layout)
    epochs = Epochs(samples, layout, config.batch.rows, capacity, config.seed, shuffle=True)
    return Batches(epochs, config.epochs, config.num_workers)


def evaluation_batches(samples: SampleSet, config: DataConfig, layout: Layout) -> "Batches":
    """One pass over `samples` (at least one) in a fixed order, built in this process."""
    capacity = row_capacity(samples, config, layout)
    return Batches(Epochs(samples, layout, config.batch.rows, capacity, config.seed, shuffle=False), 1, 0)


class Batches(Iterator[Batch]):
    """An iterator of batches whose position can be saved and restored. Close it, or use it in a `with`."""

    def __init__(self, epochs: Epochs, num_epochs: int | None, num_workers: int) -> None:
        """`num_epochs` None: endless. Worker processes start with the first batch."""
        self.epochs, self._num_epochs, self._num_workers = epochs, num_epochs, num_workers
        self._position = (0, 0)
        # At most one grain iterator; without close() it must end before the interpreter shuts down.
        self._running: list[Any] = []
        weakref.finalize(self, _end, self._running)

    def __next__(self) -> Batch:
        if not self._running:
            self._running.append(self._loader())
        try:
            batch: Batch = next(self._running[0]).batch
        except RuntimeError as error:
            self.close()
            raise PshareError(f"A worker process of the data loader failed: {error}") from error
        self._position = (batch.epoch + 1, 0) if batch.is_last else (batch.epoch, batch.number + 1)
        return batch

    def num_batches(self) -> int | None:
        """Number of batches from here to the end; None if endless."""
        return None if self._num_epochs is None else len(self._rest())

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch and what it depends on, as plain values for JSON."""
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch, **self.epochs.identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to the position of `state`, so that the batches continue the run that saved it.

        Raises:
            PshareError: the data, or a setting that determines the batches, differ from that run's.
        """
        for name, value in self.epochs.identity.items():
            if state.get(name) == value:
                continue
            if name == "rows" and state["batch"]:
                raise PshareError(
                    f"data.batch.rows can change only between two epochs, but the checkpoint is after batch {state['batch']} "
                    f"of epoch {state['epoch'] + 1}; resume with data.batch.rows={state[name]}."
                )
            if name != "rows":
                values = "" if name == "samples" else f" ({state.get(name)}, now {value})"
                raise PshareError(
                    f"The checkpoint was made with other data: {name} differ{values}; resume with the same data and "
                    "settings, or start a new run."
                )
        self.close()
        self._position = (state["epoch"], state["batch"])

    def close(self) -> None:
        """Ends the worker processes; the next batch starts them again at the same position."""
        _end(self._running)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _rest(self) -> "_BatchSource":
        return _BatchSource(self.epochs, *self._position, self._num_epochs)

    def _loader(self) -> Any:
        if not flags.FLAGS.is_parsed():
            # grain reads absl flags when it starts workers; they are parsed only under absl's main.
            flags.FLAGS.mark_as_parsed()
        source = self._rest()
        # No read threads: building a batch takes a few copies, and workers overlap it with the training step.
        data = grain.MapDataset.source(source).to_iter_dataset(grain.ReadOptions(num_threads=0))
        num_workers = min(self._num_workers, len(source))
        workers = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=_BUFFERED_BATCHES)
        return iter(data.mp_prefetch(workers))


def _end(running: list[Any]) -> None:
    while running:
        running.pop().close()


class _OpaqueBatch:
    """Hides the arrays from grain, which would put them into shared memory, of which containers have little."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch


class _BatchSource:
    """grain's random-access source: the batches from a position on. Sent to the workers; stateless, since grain calls
    it from several threads.
    """

    def __init__(self, epochs: Epochs, epoch: int, batch: int, num_epochs: int | None) -> None:
        self._epochs, self._epoch, self._batch, self._num_epochs = epochs, epoch, batch, num_epochs

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        exit_with_parent()

    def __len__(self) -> int:
        if self._num_epochs is None:
            return _ENDLESS
        counts = [self._epochs.num_batches(epoch) for epoch in range(self._epoch, self._num_epochs)]
        return max(0, sum(counts) - self._batch)

    def __getitem__(self, index: int) -> "_OpaqueBatch":
        epoch, number = self._epoch, self._batch + index
        while number >= self._epochs.num_batches(epoch):
            number -= self._epochs.num_batches(epoch)
            epoch += 1
        return _OpaqueBatch(self._epochs.batch(epoch, number))
