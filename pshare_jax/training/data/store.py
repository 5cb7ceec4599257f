"""Prepared samples on disk: token ids are memory-mapped, so that memory stays small.

`prepare.py` writes them into a folder of its cache; the loader and its worker processes read them at random. A store holds
its folder, so that the cache does not remove it.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from pshare_jax.share.boundary import base_len, next_position
from pshare_jax.training.data.cache import hold
from pshare_jax.training.data.samples import Sample

_IDS, _NAMES = "ids", "names.json"
_TABLES = ("ends", "turn_ends", "turns", "sources", "lines", "records", "rejected", "stream_lens")
"""Arrays over samples: where ids and turns of a sample end, the turns, source, line and number of its record, the tokens of its
rejected answer, and those that one stream reads.
"""


def write_samples(folder: Path, samples: Iterable[tuple[int, Sample]]) -> None:
    """Writes samples, each with its record's number, into an existing folder, for `SampleStore`."""
    names: dict[str, int] = {}
    ends, turn_ends, turns, sources, lines, records, rejected, streams = [0], [0], [], [], [], [], [], []
    digest = hashlib.blake2b(digest_size=16)
    with (folder / _IDS).open("wb") as file:
        for record, sample in samples:
            ids = np.asarray(sample.ids + sample.rejected, np.int32)
            file.write(ids.tobytes())
            digest.update(ids.tobytes() + repr((len(sample.ids), sample.turns)).encode())
            ends.append(ends[-1] + len(ids))
            turns.extend(sample.turns)
            turn_ends.append(len(turns))
            sources.append(names.setdefault(sample.source, len(names)))
            lines.append(sample.line)
            records.append(record)
            rejected.append(len(sample.rejected))
            streams.append(sum(next_position(len(part.ids)) for part in sample.whole))
    columns = (ends, turn_ends, np.array(turns).reshape(-1, 2), sources, lines, records, rejected, streams)
    for name, values in zip(_TABLES, columns, strict=True):
        np.save(folder / f"{name}.npy", np.asarray(values, np.int32 if name in ("turns", "sources") else np.int64))
    (folder / _NAMES).write_text(json.dumps({"sources": list(names), "digest": digest.hexdigest()}))


class SampleStore(Sequence[Sample]):
    """An immutable sequence of samples; `context_lens`, `stream_lens` (tokens that one stream reads), `answer_lens` and `records`
    are arrays over it.

    A pickled store opens the same folder in another process.
    """

    def __init__(self, folder: Path) -> None:
        """The samples that `write_samples` wrote.

        Raises:
            OSError: the folder does not exist or has been removed.
            ValueError: its files are not whole.
        """
        self.folder = folder
        self._release = weakref.finalize(self, os.close, hold(folder))
        names = json.loads((folder / _NAMES).read_text())
        self._names: list[str] = names["sources"]
        self.digest: str = names["digest"]
        tables = {name: np.load(folder / f"{name}.npy") for name in _TABLES}
        self._ends, self._turn_ends, self._turns = (tables[name] for name in ("ends", "turn_ends", "turns"))
        self._sources, self._lines, self.records = (tables[name] for name in ("sources", "lines", "records"))
        self._rejected, self.stream_lens = tables["rejected"], tables["stream_lens"]
        # An empty file cannot be memory-mapped.
        self._ids = np.memmap(folder / _IDS, np.int32, "r") if self._ends[-1] else np.empty(0, np.int32)
        if len(self._ids) != self._ends[-1]:
            raise ValueError(f"{folder} has {len(self._ids)} ids, not {self._ends[-1]}")
        lengths = np.concatenate([[0], np.cumsum(self._turns[:, 1] - self._turns[:, 0])])
        self.answer_lens = np.diff(lengths[self._turn_ends]) + self._rejected
        self.context_lens = base_len(self._turns[self._turn_ends[1:] - 1, 0].astype(np.int64))

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        end = int(self._ends[index + 1] - self._rejected[index])
        ids, rejected = self._ids[self._ends[index] : end], self._ids[end : self._ends[index + 1]]
        turns = self._turns[self._turn_ends[index] : self._turn_ends[index + 1]]
        source = self._names[self._sources[index]]
        return Sample(
            tuple(ids.tolist()),
            tuple(map(tuple, turns.tolist())),
            source,
            int(self._lines[index]),
            tuple(rejected.tolist()),
        )

    def __reduce__(self) -> tuple[type["SampleStore"], tuple[Path]]:
        return SampleStore, (self.folder,)
