"""Preparation of the data before training: reads, renders, checks, counts, splits and stores the samples, once.

`prepare` is the entry point; `run.py` prints its report and passes the two sets to `loader.py`. What was prepared before is
read from the cache (`cache.py`), and no source.
"""

import contextlib
import hashlib
import itertools
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data import cache
from pshare_jax.training.data.batches import Layout
from pshare_jax.training.data.config import DataConfig, SourceConfig, check_data, paths_of
from pshare_jax.training.data.overlap import Asked, joined
from pshare_jax.training.data.rendering import Rendered, Rendering, read_items
from pshare_jax.training.data.report import Report, SourceReport, read_report
from pshare_jax.training.data.samples import Limits, Sample
from pshare_jax.training.data.store import SampleStore, write_samples
from pshare_jax.training.processes import ordered_map

_MEMBERS, _REPORT = "members.npz", "report.json"


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
    """The samples of all sources of `config` that fit a row of `layout`, from the cache if they have been prepared before.

    `stop_ids` end generation with the model; `vocab_size` is the number of its embeddings (None: not checked). Chats are
    written in the module's `style`, and tell the config's clock (None: this time). With `pairs` each sample has a chosen and a
    rejected answer.

    Raises:
        PshareError: a wrong setting, an unreadable source, a source without a usable record, or a cache folder that cannot
            be written.
    """
    check_data(config)
    style = style or ChatStyle()
    chat = _reads_chats(config, tokenizer, style)
    stop_ids |= tokenizer.turn_ends(style)
    limits = replace(_limits(config, layout), vocab_size=vocab_size)
    rendering = Rendering(
        tokenizer, config.time or datetime.now(), stop_ids, chat, limits, style, config.has_evaluation, pairs
    )
    sets = cache.PreparedSets(cache.data_folder())
    key = _key(config, rendering)
    data = _opened(sets, key, config)
    if data is None:
        with sets.new(key) as folder:
            _write(folder, config, rendering)
            if _key(config, rendering) != key:
                raise PshareError("A source changed while it was read; start again when its files are complete.")
        data = _opened(sets, key, config)
    if data is None:
        raise PshareError(f"The prepared data vanished from the cache folder {sets.root}; start again.")
    return data


def _key(config: DataConfig, rendering: Rendering) -> str:
    sources = [(source, path) for source in [*config.sources, *config.eval_sources] for path in paths_of(source)]
    settings = {
        "records": [[source.shape, source.columns, source.ignore] for source, _ in sources],
        "groups": [len(paths_of(source)) for source in config.sources],
        "evaluation": [config.eval_fraction, config.seed if config.eval_fraction else None],
        **rendering.settings,
    }
    return cache.set_key([path for _, path in sources], rendering.tokenizer, rendering.clock, settings)


def _write(folder: Path, config: DataConfig, rendering: Rendering) -> None:
    reading = _Reading(rendering, config.num_workers)
    write_samples(folder, reading.samples([*config.sources, *config.eval_sources]))
    store = SampleStore(folder)
    split_at = len(config.sources)
    groups = [np.flatnonzero(np.array(reading.groups) == index) for index in range(split_at + len(config.eval_sources))]
    train, evaluation = groups[:split_at], groups[split_at:]
    if config.eval_fraction:
        train, evaluation = _split(store, train, config)
    leaked = (0, 0)
    if config.has_evaluation:
        leaked = _leaked(*([reading.asked[at] for at in _records(store, groups)] for groups in (train, evaluation)))
    report = Report(reading.reports, sum(map(len, train)), sum(map(len, evaluation)), *leaked)
    np.savez(folder / _MEMBERS, *train, *evaluation)
    (folder / _REPORT).write_text(json.dumps(asdict(report)))


def _opened(sets: cache.PreparedSets, key: str, config: DataConfig) -> PreparedData | None:
    """The set of that key; None if there is none, or its files are damaged."""
    folder = sets.find(key)
    if folder is None:
        return None
    try:
        store = SampleStore(folder)
        report = read_report(json.loads((folder / _REPORT).read_text()))
        with (folder / _MEMBERS).open("rb") as file, np.load(file) as members:
            groups = tuple(members[name] for name in members.files)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        sets.remove(key)
        return None
    weights = tuple(source.weight for source in config.sources)
    train, evaluation = groups[: len(weights)], groups[len(weights) :]
    return PreparedData(
        SampleSet(store, train, weights), SampleSet(store, evaluation, (1.0,) * len(evaluation)), report
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
    """Reads sources in order; `groups` holds for each sample the index of its source in the config, `asked` for each record
    what it asks, if there is an evaluation to compare with.
    """

    rendering: Rendering
    num_workers: int
    reports: list[SourceReport] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    asked: dict[int, Asked] = field(default_factory=dict)
    num_records: int = 0

    def samples(self, sources: Sequence[SourceConfig]) -> Iterator[tuple[int, Sample]]:
        """All samples, each with the number of its record."""
        groups = [(group, path) for group, source in enumerate(sources) for path in paths_of(source)]
        items = read_items([(path, sources[group]) for group, path in groups])
        with contextlib.closing(ordered_map(self.rendering, items, self.num_workers)) as found:
            for at, rendered in itertools.groupby(found, key=lambda one: one.at):
                for sample in self._counted(rendered):
                    self.groups.append(groups[at][0])
                    yield self.num_records, sample

    def _counted(self, rendered: Iterable[Rendered]) -> Iterator[Sample]:
        """The samples of one path."""
        first = len(self.reports)
        for one in rendered:
            if one.error is not None:
                raise one.error
            if len(self.reports) == first or self.reports[-1].name != one.name:
                self._check(self.reports[first:])
                self.reports.append(SourceReport(one.name))
            report = self.reports[-1]
            self.num_records += 1
            if one.dropped is not None:
                report.drop(one.line, *one.dropped)
                continue
            report.keep(one.line, one.samples, one.left_out or {}, self.rendering.stop_ids)
            report.skip(one.line, *one.unread)
            if one.asked is not None:
                self.asked[self.num_records] = one.asked
            yield from one.samples
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
