"""Records to samples, one by one: what `prepare.py` maps over a run's records, in worker processes or its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.config import SourceConfig
from pshare_jax.training.data.files import Broken
from pshare_jax.training.data.overlap import Asked, asked
from pshare_jax.training.data.records import Dropped, RecordReader
from pshare_jax.training.data.samples import Limits, Sample
from pshare_jax.training.data.shapes import shaped
from pshare_jax.training.data.sources import Record, read_source
from pshare_jax.training.data.unread import Unread, unread_fields


class Item(NamedTuple):
    """A record of the config's path number `at`, or an error of its source."""

    at: int
    source: SourceConfig
    record: Record | PshareError


class Rendered(NamedTuple):
    """What became of an item: samples, numbers of omitted turns by reason and fields without effect, why the record was
    `dropped` (reason and detail), or the error.
    """

    at: int
    name: str
    line: int
    samples: Sequence[Sample] = ()
    left_out: Mapping[str, int] | None = None
    dropped: tuple[str, str] | None = None
    unread: Unread = Unread([], [])
    asked: Asked | None = None
    error: PshareError | None = None


@dataclass(frozen=True)
class Rendering:
    """Makes samples of records, in this process or, pickled, in others; with `pairs` those of two answers. `compares`: also notes
    what the records ask.
    """

    tokenizer: Tokenizer
    clock: datetime
    stop_ids: frozenset[int]
    chat: bool
    limits: Limits
    style: ChatStyle
    compares: bool
    pairs: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that determine the samples, beside tokenizer and clock."""
        plain = {"stop_ids": sorted(self.stop_ids), "chat": self.chat, "compares": self.compares, "pairs": self.pairs}
        return plain | {"limits": asdict(self.limits), "style": asdict(self.style)}

    @cached_property
    def _reader(self) -> RecordReader:
        tokenizer = self.tokenizer.at(self.clock)
        return RecordReader(tokenizer, self.stop_ids, self.chat, self.limits, self.style, pairs=self.pairs)

    def __call__(self, item: Item) -> Rendered:
        """What becomes of the item.

        Raises:
            PshareError: the tokenizer cannot end answers.
        """
        if isinstance(item.record, PshareError):
            return Rendered(item.at, "", 0, error=item.record)
        name, line, content = item.record
        if isinstance(content, Broken):
            return Rendered(item.at, name, line, dropped=(content.reason, content.detail))
        try:
            record = shaped(content, item.source.shape, item.source.columns)
            samples, left_out = self._reader.samples(record, name, line)
        except Dropped as dropped:
            return Rendered(item.at, name, line, dropped=(dropped.reason, dropped.detail))
        unread = unread_fields(content, record, item.source, self._reader)
        return Rendered(item.at, name, line, samples, left_out, None, unread, asked(record) if self.compares else None)


def read_items(sources: Sequence[tuple[str, SourceConfig]]) -> Iterator[Item]:
    """All records in order. An error is an item too, the last, so that it comes after what the records before it give."""
    for at, (path, source) in enumerate(sources):
        empty = True
        try:
            for record in read_source(path):
                empty = False
                yield Item(at, source, record)
            if empty:
                raise PshareError(f"{path} contains no records; remove the source or fill it.")
        except PshareError as error:
            yield Item(at, source, error)
            return
