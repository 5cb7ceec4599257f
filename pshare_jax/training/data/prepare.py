"""Everything that happens to the data before training: read, render, check, count, split, store.

`prepare` is the one entry; the trainer prints its report and hands the two sets to `pipeline.py`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.batches import Layout
from pshare_jax.training.data.config import DataConfig, SourceConfig, check_data, paths_of
from pshare_jax.training.data.records import Dropped, RecordReader
from pshare_jax.training.data.report import Report, SourceReport
from pshare_jax.training.data.samples import Limits, Sample
from pshare_jax.training.data.sources import Broken, read_source
from pshare_jax.training.data.store import SampleStore


@dataclass(frozen=True)
class SampleSet:
    """Samples of the store by source: `members` are indices into it, `weights` how often an epoch uses each source."""

    store: SampleStore
    members: tuple[np.ndarray, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.members))


@dataclass(frozen=True)
class PreparedData:
    """The samples to train on, those to evaluate on (perhaps none), and what became of every record."""

    train: SampleSet
    evaluation: SampleSet
    report: Report


def prepare(
    config: DataConfig,
    tokenizer: Tokenizer,
    stop_ids: frozenset[int],
    layout: Layout = "two_stream",
    vocab_size: int | None = None,
) -> PreparedData:
    """Reads all sources of `config` and makes their samples, none larger than a row of `layout`.

    `stop_ids` are the ids that end generation with the model, `vocab_size` is the number of its embeddings (None: as many
    as the tokenizer can need).

    Raises:
        PshareError: a wrong setting, a source that cannot be read, or one of which no record can be used.
    """
    check_data(config)
    if config.format == "chat" and tokenizer.chat_template is None:
        raise PshareError(
            "The model has no chat template; set data.format to text to train on prompts and completions."
        )
    chat = tokenizer.chat_template is not None if config.format is None else config.format == "chat"
    limits = replace(_limits(config, layout), vocab_size=vocab_size)
    reading = _Reading(RecordReader(tokenizer, stop_ids, chat, limits), stop_ids)
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


def _limits(config: DataConfig, layout: Layout) -> Limits:
    context_len, answer_len = config.batch.context_len, config.batch.answer_len
    if layout == "one_stream" and context_len is not None:
        # All but the last token of a sample is input.
        return Limits(min(config.max_len, context_len + 1), None, answer_len)
    return Limits(config.max_len, context_len, answer_len)


@dataclass
class _Reading:
    """Reads sources one by one; `groups` says for each sample which source of the config it came from."""

    reader: RecordReader
    stop_ids: frozenset[int]
    reports: list[SourceReport] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    num_records: int = 0

    def samples(self, sources: Sequence[SourceConfig]) -> Iterator[tuple[int, Sample]]:
        for group, source in enumerate(sources):
            for path in paths_of(source):
                for sample in self._read(path):
                    self.groups.append(group)
                    yield self.num_records, sample

    def _read(self, path: str) -> Iterator[Sample]:
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
                samples, left_out = self.reader.samples(content, source, line)
            except Dropped as dropped:
                report.drop(line, dropped.reason, dropped.detail)
                continue
            report.keep(line, samples, left_out, self.stop_ids)
            yield from samples
        if len(self.reports) == first:
            raise PshareError(f"{path} holds no records.")
        self._check(self.reports[first:])

    def _check(self, reports: list[SourceReport]) -> None:
        """A file of which nothing is left ends the run: most likely it is not what the user thinks."""
        if reports and not reports[-1].kept:
            last = reports[-1]
            raise PshareError(
                f"None of the {last.read} records of {last.name} can be used, most often because of: "
                f"{last.main_reason.removesuffix('.')}."
            )


# --- the split -------------------------------------------------------------------------------------------------------


def _split(
    store: SampleStore, groups: list[np.ndarray], config: DataConfig
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Whole records go to one side, equal ones to the same: those with the smallest hash of seed and content."""
    train, evaluation = [], []
    for index, group in enumerate(groups):
        records = store.records[group]
        marks = _record_marks(store, group, config.seed)
        ranked = sorted(marks.values())
        count = max(1, round(config.eval_fraction * len(ranked)))
        last = ranked[count - 1]
        kept_out = np.array([marks[int(record)] <= last for record in records], bool)
        if kept_out.all():
            raise PshareError(
                f"data.eval_fraction leaves no training record of data.sources.{index}, which has {len(ranked)}; "
                "lower it or give data.eval_sources."
            )
        train.append(group[~kept_out])
        evaluation.append(group[kept_out])
    return train, evaluation


def _record_marks(store: SampleStore, group: np.ndarray, seed: int) -> dict[int, bytes]:
    hashes: dict[int, hashlib.blake2b] = {}
    for index in group.tolist():
        sample = store[index]
        mark = hashes.setdefault(int(store.records[index]), hashlib.blake2b(str(seed).encode(), digest_size=16))
        mark.update(np.asarray(sample.ids, np.int32).tobytes() + repr(sample.turns).encode())
    return {record: mark.digest() for record, mark in hashes.items()}


def _leaked(store: SampleStore, train: list[np.ndarray], evaluation: list[np.ndarray]) -> int:
    """How many evaluation answers training also has, after the same prompt."""
    if not any(map(len, evaluation)):
        return 0
    known = {mark for group in train for index in group.tolist() for mark in _turn_marks(store[index])}
    return sum(mark in known for group in evaluation for index in group.tolist() for mark in _turn_marks(store[index]))


def _turn_marks(sample: Sample) -> Iterator[bytes]:
    ids = np.asarray(sample.ids, np.int32)
    for start, end in sample.turns:
        yield hashlib.blake2b(ids[:end].tobytes() + start.to_bytes(4, "little"), digest_size=16).digest()
