"""The batches of each epoch: mixture, shuffle and packing, determined by sample lengths and the seed.

Each worker process of `loader.py` has a copy and derives the same batches.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pshare_jax.training.data.batches import Layout, OneStreamBatch, TwoStreamBatch, one_stream, two_stream
from pshare_jax.training.data.packing import fill, pack, random_order
from pshare_jax.training.data.prepare import SampleSet

_KEPT_PLANS = 2


class Batch(NamedTuple):
    """Batch `number` of `epoch` (both from 0): its arrays, and for each row the (source, line) of its samples."""

    arrays: TwoStreamBatch | OneStreamBatch
    samples: tuple[tuple[tuple[str, int], ...], ...]
    epoch: int
    number: int
    is_last: bool


class Epochs:
    """All batches of `samples`, as `batch(epoch, number)`; `capacity` is a row's context and answer length.

    An epoch is `weight` passes over each source, shuffled together. A pass may span epochs: with a weight of 0.5 two
    epochs use every sample once. No row mixes epochs; an epoch's last batch is filled up with empty rows.
    """

    def __init__(
        self, samples: SampleSet, layout: Layout, num_rows: int, capacity: tuple[int, int], seed: int, shuffle: bool
    ) -> None:
        self._samples, self._layout, self._num_rows, self._capacity = samples, layout, num_rows, capacity
        self._seed, self._shuffle = seed, shuffle
        self._lengths = sample_lengths(samples, layout)
        # Caches of deterministic values, so threads need no lock.
        self._plans: dict[int, list[list[list[int]]]] = {}
        self._counts: dict[int, int] = {}

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values that determine every batch: runs with equal values see equal data."""
        members = hashlib.blake2b(digest_size=16)
        for group in self._samples.members:
            members.update(len(group).to_bytes(8, "little") + group.tobytes())
        return {
            "samples": f"{self._samples.store.digest}-{members.hexdigest()}",
            "weights": list(self._samples.weights),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "layout": self._layout,
            "rows": self._num_rows,
            "lengths": list(self._capacity),
        }

    def num_batches(self, epoch: int) -> int:
        """Number of batches in an epoch; it varies slightly with the packing."""
        if epoch not in self._counts:
            self._counts[epoch] = len(self._plan(epoch))
        return self._counts[epoch]

    def fill(self, epoch: int = 0) -> float:
        """The fraction of an epoch's positions that hold tokens and not padding."""
        plan = self._plan(epoch)
        used = [index for batch in plan for row in batch for index in row]
        return fill(self._lengths[used], len(plan) * self._num_rows, self._capacity)

    def batch(self, epoch: int, number: int) -> Batch:
        """Batch `number` of `epoch`."""
        plan = self._plan(epoch)
        rows = [[self._samples.store[at] for at in row] for row in plan[number]]
        rows += [[] for _ in range(self._num_rows - len(rows))]
        arrays = two_stream if self._layout == "two_stream" else one_stream
        names = tuple(tuple((sample.source, sample.line) for sample in row) for row in rows)
        return Batch(arrays(rows, *self._capacity), names, epoch, number, number == len(plan) - 1)

    def _plan(self, epoch: int) -> list[list[list[int]]]:
        """The epoch's batches as rows of indices into the store."""
        batches = self._plans.get(epoch)
        if batches is None:
            batches = self._planned(epoch)
            self._plans = dict([*self._plans.items(), (epoch, batches)][-_KEPT_PLANS:])
        return batches

    def _planned(self, epoch: int) -> list[list[list[int]]]:
        members = self._epoch_members(epoch)
        rng = self._rng(0, epoch) if self._shuffle else None
        if rng is not None:
            members = members[random_order(rng, len(members))]
        rows = [[int(members[at]) for at in row] for row in pack(self._lengths[members], self._capacity, rng)]
        return [rows[at : at + self._num_rows] for at in range(0, len(rows), self._num_rows)]

    def _epoch_members(self, epoch: int) -> np.ndarray:
        groups = zip(self._samples.members, self._samples.weights, strict=True)
        parts = [
            self._part(source, group, weight, epoch) for source, (group, weight) in enumerate(groups) if len(group)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _part(self, source: int, group: np.ndarray, weight: float, epoch: int) -> np.ndarray:
        """An epoch's part of a source: a range of its endless sequence of passes, each with its own shuffle."""
        count = max(1, round(weight * len(group)))
        positions = np.arange(epoch * count, (epoch + 1) * count)
        if not self._shuffle:
            return group[positions % len(group)]
        passes, inside = np.divmod(positions, len(group))
        orders = {at: random_order(self._rng(1, source, at), len(group)) for at in np.unique(passes).tolist()}
        return group[[orders[at][position] for at, position in zip(passes.tolist(), inside.tolist(), strict=True)]]

    def _rng(self, *key: int) -> np.random.PCG64:
        return np.random.PCG64(np.random.SeedSequence(self._seed, spawn_key=key))


def sample_lengths(samples: SampleSet, layout: Layout) -> np.ndarray:
    """For every sample of the store, its context and answer positions in a row of `layout`, [N, 2]."""
    store = samples.store
    context = store.context_lens if layout == "two_stream" else store.stream_lens
    return np.stack([context, store.answer_lens], axis=1)


def members_of(samples: SampleSet) -> Sequence[int]:
    """Indices of all samples of the set."""
    return [int(index) for group in samples.members for index in group]
