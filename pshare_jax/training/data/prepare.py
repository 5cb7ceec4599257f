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
from pshare_jax.training.data.records import Dropped, RecordReader
from pshare_jax.training.data.report import Report, SourceReport
from pshare_jax.training.data.samples import Limits, Sample
from pshare_jax.training.data.shapes import shaped
from pshare_jax.training.data.sources import read_source
from pshare_jax.training.data.store import SampleStore
from pshare_jax.training.data.unread import unread_fields


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
    pairs: bool = False,
) -> PreparedData:
    """Reads all sources of `config` and makes samples that fit a row of `layout`.

    `stop_ids` end generation with the model; `vocab_size` is the number of its embeddings (None: not checked). Chats are
    written in the module's `style`. With `pairs` each sample has a chosen and a rejected answer.

    Raises:
        PshareError: a wrong setting, an unreadable source, or a source without a usable record.
    """
    check_data(config)
    style = style or ChatStyle()
    chat = _reads_chats(config, tokenizer, style)
    stop_ids |= tokenizer.turn_ends(style)
    limits = replace(_limits(config, layout), vocab_size=vocab_size)
    reading = _Reading(RecordReader(tokenizer, stop_ids, chat, limits, style, pairs=pairs), stop_ids)
    store = SampleStore(reading.samples([*config.sources, *config.eval_sources]))
    split_at = len(config.sources)
    groups = [np.flatnonzero(np.array(reading.groups) == index) for index in range(split_at + len(config.eval_sources))]
    train, evaluation = groups[:split_at], groups[split_at:]
    if config.eval_fraction:
        train, evaluation = _split(store, train, config)
    weights = tuple(source.weight for source in config.sources)
    report = Report(reading.reports, sum(map(len, train)), sum(map(len, evaluation)), _leaked(store, train, evaluation))
    return PreparedData(
        SampleSet(store, tuple(train), weights), SampleSet(store, tuple(evaluation), (1.0,) * len(evaluation)), report
    )


def _reads_chats(config: DataConfig, tokenizer: Tokenizer, style: ChatStyle) -> bool:
    chat = tokenizer.reads_chats(style)
    if config.format == "chat" and style.text_prompt is not None:
        raise PshareError("data.format: chat and module.text_prompt exclude each other; leave out one of them.")
    if config.format == "chat" and not chat:
        raise PshareError(
            "data.format: chat needs a chat template, which the base lacks; set module.chat_template, such as plain."
        )
    if config.format == "text" and style.template is not None:
        raise PshareError("data.format: text and module.chat_template exclude each other; leave out one of them.")
    return chat and config.format != "text"


def _limits(config: DataConfig, layout: Layout) -> Limits:
    context_len, answer_len = config.batch.context_len, config.batch.answer_len
    if layout == "one_stream" and context_len is not None:
        # A sample's last token is only a target.
        return Limits(min(config.max_len, context_len + 1), None, answer_len, stream_len=context_len)
    return Limits(config.max_len, context_len, answer_len)


@dataclass
class _Reading:
    """Reads sources in order; `groups` holds for each sample the index of its source in the config."""

    reader: RecordReader
    stop_ids: frozenset[int]
    reports: list[SourceReport] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
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
            report.skip(line, *unread_fields(content, record, config, self.reader))
            yield from samples
        if len(self.reports) == first:
            raise PshareError(f"{path} contains no records; remove the source or fill it.")
        self._check(self.reports[first:])

    def _check(self, reports: list[SourceReport]) -> None:
        """A file without a usable record ends the run: most likely it is not the file that the user intended. So does one
        with fields that would be lost.
        """
        if reports and not reports[-1].kept:
            last = reports[-1]
            raise PshareError(
                f"None of the {last.read} records of {last.name} can be used; fix or remove the source. Main reason: "
                f"{last.main_reason.removesuffix('.')}."
            )
        if reports:
            reports[-1].check_lost()


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


def _leaked(store: SampleStore, train: list[np.ndarray], evaluation: list[np.ndarray]) -> int:
    """Number of evaluation answers that are also in the training data, with the same prompt."""
    if not any(map(len, evaluation)):
        return 0
    known = {mark for group in train for index in group.tolist() for mark in _turn_marks(store[index])}
    return sum(mark in known for group in evaluation for index in group.tolist() for mark in _turn_marks(store[index]))


def _turn_marks(sample: Sample) -> Iterator[bytes]:
    ids = np.asarray(sample.ids, np.int32)
    for start, end in sample.turns:
        yield hashlib.blake2b(ids[:end].tobytes() + start.to_bytes(4, "little"), digest_size=16).digest()
