"""Prepared samples on disk: token ids are in a memory-mapped file, so that memory stays small.

`prepare.py` writes a store, the loader and its worker processes read it at random. A pickled store opens the same files
in another process; the store that wrote them deletes its folder when it is collected.
"""

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from pshare_jax.share.boundary import base_len, next_position
from pshare_jax.training.data.samples import Sample


class SampleStore(Sequence[Sample]):
    """An immutable sequence of samples; `context_lens`, `stream_lens` (tokens that one stream reads), `answer_lens` and `records`
    are arrays over it.
    """

    def __init__(self, samples: Iterable[tuple[int, Sample]], folder: Path | None = None) -> None:
        """Writes `samples`, each with its record's number, below `folder` (None: the system's temporary folder)."""
        root = Path(tempfile.mkdtemp(prefix="pshare-data-", dir=folder))
        self._clean_up = weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
        self._path = root / "ids"
        names: dict[str, int] = {}
        ends, num_turns, turns, sources, lines, records, rejected, read = [0], [0], [], [], [], [], [], []
        digest = hashlib.blake2b(digest_size=16)
        with self._path.open("wb") as file:
            for record, sample in samples:
                ids = np.asarray(sample.ids + sample.rejected, np.int32)
                file.write(ids.tobytes())
                digest.update(ids.tobytes() + repr((len(sample.ids), sample.turns)).encode())
                ends.append(ends[-1] + len(ids))
                turns.extend(sample.turns)
                num_turns.append(len(turns))
                sources.append(names.setdefault(sample.source, len(names)))
                lines.append(sample.line)
                records.append(record)
                rejected.append(len(sample.rejected))
                read.append(sum(next_position(len(part.ids)) for part in sample.whole))
        self._names = list(names)
        self._ends, self._turn_ends = np.array(ends, np.int64), np.array(num_turns, np.int64)
        self._turns = np.array(turns, np.int32).reshape(-1, 2)
        self._sources, self._lines = np.array(sources, np.int32), np.array(lines, np.int64)
        self.records = np.array(records, np.int64)
        self.digest = digest.hexdigest()
        lengths = np.concatenate([[0], np.cumsum(self._turns[:, 1] - self._turns[:, 0])])
        self._rejected = np.array(rejected, np.int64)
        self.answer_lens = np.diff(lengths[self._turn_ends]) + self._rejected
        self.stream_lens = np.array(read, np.int64)
        self.context_lens = base_len(self._turns[self._turn_ends[1:] - 1, 0].astype(np.int64))
        self._ids = self._mapped()

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

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_ids", "_clean_up")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ids = self._mapped()

    def _mapped(self) -> np.ndarray:
        # An empty file cannot be memory-mapped.
        return np.memmap(self._path, np.int32, "r") if self._ends[-1] else np.empty(0, np.int32)
