"""Preparation of the data before training: reads, renders, checks, counts, splits and stores the samples.

`prepare` is the entry point; `run.py` prints its report and passes the two sets to `loader.py`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.batches import Layout
from pshare_jax.training.data.config import DataConfig, SourceConfig, check_data, paths_of
from pshare_jax.training.data.files import Broken
from pshare_jax.training.data.overlap import Asked, asked, joined
from pshare_jax.training.data.records import Dropped, RecordReader
from pshare_jax.training.data.report import Report, SourceReport
from pshare_jax.training.data.samples import Limits, Sample
from pshare_jax.training.data.shapes import shaped
from pshare_jax.training.data.sources import read_source
from pshare_jax.training.data.store import SampleStore


@dataclass(frozen=True)
class SampleSet:
    """Samples by source: `members` are indices into the store, `weights` the passes over each source in an epoch."""

    store: SampleStore
    members: tuple[np.ndarray, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.members))


@dataclass(frozen=True)
class PreparedData:
    """Training samples, evaluation samples (maybe none), and the report."""

    train: SampleSet
    evaluation: SampleSet
    report: Report


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    stop_ids: frozenset[int],
    layout: Layout = "two_stream",
    vocab_size: int | None = None,
    style: ChatStyle | None = None,
) -> PreparedData:
    """Reads all sources of `config` and makes samples that fit a row of `layout`.

    `stop_ids` end generation with the model; `vocab_size` is the number of its embeddings (None: not checked). Chats are
    written in the module's `style`.

    Raises:
        PshareError: a wrong setting, an unreadable source, or a source without a usable record.
    """
    check_data(config)
    if config.format == "chat" and tokenizer.chat_template is None:
        raise PshareError("data.format: chat needs a chat template, which the model lacks; set data.format: text.")
    chat = tokenizer.chat_template is not None if config.format is None else config.format == "chat"
    limits = replace(_limits(config, layout), vocab_size=vocab_size)
    reading = _Reading(RecordReader(tokenizer, stop_ids, chat, limits, style), stop_ids, config.has_evaluation)
    store = SampleStore(reading.samples([*config.sources, *config.eval_sources]))
    split_at = len(config.sources)
    groups = [np.flatnonzero(np.array(reading.groups) == index) for index in range(split_at + len(config.eval_sources))]
    train, evaluation = groups[:split_at], groups[split_at:]
    if config.eval_fraction:
        train, evaluation = _split(store, train, config)
    weights = tuple(source.weight for source in config.sources)
    leaked = (0, 0)
    if config.has_evaluation:
        leaked = _leaked(*([reading.asked[at] for at in _records(store, groups)] for groups in (train, evaluation)))
    report = Report(reading.reports, sum(map(len, train)), sum(map(len, evaluation)), *leaked)
    return PreparedData(
        SampleSet(store, tuple(train), weights), SampleSet(store, tuple(evaluation), (1.0,) * len(evaluation)), report
    )


def _limits(config: DataConfig, layout: Layout) -> Limits:
    context_len, answer_len = config.batch.context_len, config.batch.answer_len
    if layout == "one_stream" and context_len is not None:
        # A sample's last token is only a target.
        return Limits(min(config.max_len, context_len + 1), None, answer_len)
    return Limits(config.max_len, context_len, answer_len)


@dataclass
class _Reading:
    """Reads sources in order; `groups` holds for each sample the index of its source in the config, `asked` for each record
    what it asks, if there is an evaluation to compare with.
    """

    reader: RecordReader
    stop_ids: frozenset[int]
    compares: bool
    reports: list[SourceReport] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    asked: dict[int, Asked] = field(default_factory=dict)
    num_records: int = 0

    def samples(self, sources: Sequence[SourceConfig]) -> Iterator[tuple[int, Sample]]:
        for group, source in enumerate(sources):
            for path in paths_of(source):
                for sample in self._read(path, source):
                    self.groups.append(group)
                    yield self.num_records, sample

    def _read(self, path: str, config: SourceConfig) -> Iterator[Sample]:
        first = len(self.reports)
        for source, line, content in read_source(path):
            if len(self.reports) == first or self.reports[-1].name != source:
                self._check(self.reports[first:])
                self.reports.append(SourceReport(source))
            report = self.reports[-1]
            self.num_records += 1
            if isinstance(content, Broken):
                report.drop(line, content.reason, content.detail)
                continue
            try:
                record = shaped(content, config.shape, config.columns)
                samples, left_out = self.reader.samples(record, source, line)
            except Dropped as dropped:
                report.drop(line, dropped.reason, dropped.detail)
                continue
            report.keep(line, samples, left_out, self.stop_ids)
            if self.compares:
                self.asked[self.num_records] = asked(record)
            yield from samples
        if len(self.reports) == first:
            raise PshareError(f"{path} contains no records; remove the source or fill it.")
        self._check(self.reports[first:])

    def _check(self, reports: list[SourceReport]) -> None:
        """A file without a usable record ends the run: most likely it is not the file that the user intended."""
        if reports and not reports[-1].kept:
            last = reports[-1]
            raise PshareError(
                f"None of the {last.read} records of {last.name} can be used; fix or remove the source. Main reason: "
                f"{last.main_reason.removesuffix('.')}."
            )


# --- the split -------------------------------------------------------------------------------------------------------


def _split(
    store: SampleStore, groups: list[np.ndarray], config: DataConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Holds out the records with the smallest hash of seed and content, so that equal records stay together."""
    train, evaluation = [], []
    for index, group in enumerate(groups):
        records = store.records[group]
        marks = _record_marks(store, group, config.seed)
        ranked = sorted(marks.values())
        count = max(1, round(config.eval_fraction * len(ranked)))
        last = ranked[count - 1]
        held_out = np.array([marks[int(record)] <= last for record in records], bool)
        if held_out.all():
            raise PshareError(
                f"data.eval_fraction leaves no training record of the {len(ranked)} in data.sources.{index}; "
                "lower it or use data.eval_sources."
            )
        train.append(group[~held_out])
        evaluation.append(group[held_out])
    return train, evaluation


def _record_marks(store: SampleStore, group: np.ndarray, seed: int) -> dict[int, bytes]:
    hashes: dict[int, hashlib.blake2b] = {}
    for index in group.tolist():
        sample = store[index]
        mark = hashes.setdefault(int(store.records[index]), hashlib.blake2b(str(seed).encode(), digest_size=16))
        mark.update(np.asarray(sample.ids, np.int32).tobytes() + repr(sample.turns).encode())
    return {record: mark.digest() for record, mark in hashes.items()}


def _records(store: SampleStore, groups: list[np.ndarray]) -> list[int]:
    """The numbers of the groups' records."""
    return sorted({record for group in groups for record in store.records[group].tolist()})


def _leaked(train: list[Asked], evaluation: list[Asked]) -> tuple[int, int]:
    """Number of evaluation records whose last user message, and with a function that, is also in the training data."""
    known = joined(train)
    return (
        sum(bool(known.messages & record.last) for record in evaluation),
        sum(bool(known.functions & record.functions) for record in evaluation),
    )
