"""The data report: used and dropped records of each source, with counts and first lines for each reason."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from pshare_jax.errors import PshareError
from pshare_jax.training.data.samples import Sample

_SHOWN_LINES = 5
MAX_LOST = 0.01
"""The share of a file's used records in which a field that is meant for the model may be without effect."""


@dataclass
class Reason:
    """Number of occurrences, the first lines, and one sentence about the first occurrence."""

    count: int = 0
    lines: list[int] = field(default_factory=list)
    detail: str = ""

    def add(self, line: int, detail: str, count: int = 1) -> None:
        """Counts `count` occurrences at `line`."""
        self.count += count
        if len(self.lines) < _SHOWN_LINES and line not in self.lines:
            self.lines.append(line)
        self.detail = self.detail or detail

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.lines) else ""
        where = f"line{'s' if self.count > 1 else ''} {', '.join(map(str, self.lines))}{more}"
        return f"({where}){': ' + self.detail if self.detail else ''}"


@dataclass
class SourceReport:
    """A source. Of `read` records, `kept` were used and the others dropped. They gave `samples` samples, `split` of
    them beyond a record's first, with `turns` answers of `answer_tokens` tokens. `left_out` are single omitted answers;
    `unstopped` answers end with a token that does not stop generation. `lost` are fields that were meant for the model but
    change nothing, `unread` those that only describe a record (unread.py).
    """

    name: str
    read: int = 0
    kept: int = 0
    samples: int = 0
    split: int = 0
    turns: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    dropped: dict[str, Reason] = field(default_factory=dict)
    left_out: dict[str, Reason] = field(default_factory=dict)
    unstopped: Reason = field(default_factory=Reason)
    lost: dict[str, Reason] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)

    def drop(self, line: int, reason: str, detail: str = "") -> None:
        """Counts a dropped record."""
        self.read += 1
        self.dropped.setdefault(reason, Reason()).add(line, detail)

    def keep(
        self, line: int, samples: Sequence[Sample], left_out: Mapping[str, int], stop_ids: Collection[int]
    ) -> None:
        """Counts a used record and its omitted answers."""
        self.read += 1
        self.kept += 1
        self.samples += len(samples)
        self.split += len(samples) - 1
        self.turns += sum(len(sample.turns) for sample in samples)
        self.tokens += sum(len(sample.ids) for sample in samples)
        self.answer_tokens += sum(sample.answer_len for sample in samples)
        unstopped = sum(sample.ids[end - 1] not in stop_ids for sample in samples for _, end in sample.turns)
        if unstopped:
            self.unstopped.add(line, "", unstopped)
        for reason, count in left_out.items():
            self.left_out.setdefault(reason, Reason()).add(line, "", count)

    def skip(self, line: int, lost: Sequence[str], unread: Sequence[str]) -> None:
        """Counts fields without effect of a used record."""
        for name in lost:
            self.lost.setdefault(name, Reason()).add(line, "")
        for name in unread:
            self.unread[name] = self.unread.get(name, 0) + 1

    def check_lost(self) -> None:
        """Refuses the file if more than `MAX_LOST` of its used records have a field that is meant for the model in vain.

        Raises:
            PshareError: naming the fields, their records, and what to set.
        """
        lost = {name: reason for name, reason in self.lost.items() if reason.count > MAX_LOST * self.kept}
        if not lost:
            return
        named = ", ".join(f"{name} ({reason.count}, {reason.count / self.kept:.1%})" for name, reason in lost.items())
        ways = "".join(dict.fromkeys(map(_way_out, lost)))
        raise PshareError(
            f"{self.name} has fields whose removal changes nothing of its {self.kept} records' texts: {named}; "
            f"{ways}or leave them out by setting ignore: [{', '.join(lost)}] in the source."
        )

    @property
    def main_reason(self) -> str:
        """The most frequent reason of dropped records, with its first lines."""
        name, reason = max(self.dropped.items(), key=lambda item: item[1].count)
        return f"{name} {reason}"

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.kept} of {self.read} records used, {self.samples} samples ({self.split} split off), "
            f"{self.turns} answers, {self.answer_tokens} answer tokens of {self.tokens}"
        ]
        lines += [f"  dropped: {item.count} x {name} {item}" for name, item in self.dropped.items()]
        lines += [f"  answers omitted: {item.count} x {name} {item}" for name, item in self.left_out.items()]
        if self.unstopped.count:
            lines.append(f"  answers whose last token does not stop the model: {self.unstopped.count} {self.unstopped}")
        lines += [f"  without effect: {item.count} x {name} {item}" for name, item in self.lost.items()]
        if self.unread:
            named = ", ".join(f"{name} ({count})" for name, count in self.unread.items())
            lines.append(f"  fields that are not read: {named}")
        return "\n".join(lines)


def _way_out(field: str) -> str:
    """What makes training read a field, for the refusal."""
    if field == "tools":
        return "set module.tool_format, "
    if field.startswith(("messages.", "chat_template_kwargs")):
        return "give a template that reads them as module.chat_template, "
    return "set a shape or columns that read them, "


@dataclass
class Report:
    """All sources, and the split. `leaked` counts evaluation records whose last user message training has too, and
    `shared_functions` those with a function that training has too, both compared as in overlap.py.
    """

    sources: list[SourceReport] = field(default_factory=list)
    train_samples: int = 0
    eval_samples: int = 0
    leaked: int = 0
    shared_functions: int = 0

    def __str__(self) -> str:
        lines = [str(source) for source in self.sources]
        lines.append(f"training samples: {self.train_samples}, evaluation samples: {self.eval_samples}")
        if self.leaked:
            lines.append(f"  the last user message of {self.leaked} evaluation records is also in training")
        if self.shared_functions:
            lines.append(f"  {self.shared_functions} evaluation records list a function that training lists too")
        return "\n".join(lines)


def read_report(plain: Mapping[str, Any]) -> Report:
    """The report of `dataclasses.asdict(report)`."""
    return Report(**{**plain, "sources": [SourceReport(**_reasons(source)) for source in plain["sources"]]})


def _reasons(source: Mapping[str, Any]) -> dict[str, Any]:
    kinds = get_type_hints(SourceReport)
    made = dict(source)
    for name, value in source.items():
        if kinds[name] is Reason:
            made[name] = Reason(**value)
        elif kinds[name] == dict[str, Reason]:
            made[name] = {reason: Reason(**counts) for reason, counts in value.items()}
    return made
