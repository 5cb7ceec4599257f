"""Training samples from the turns of a conversation; `records.py` calls it.

A turn is a prompt as the server encodes it and the answer to train. Turns share a sample if each prompt continues the
ids of the previous turn.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pshare_jax.share.boundary import base_len, next_position


@dataclass(frozen=True)
class Sample:
    """Token ids with the ranges to train on.

    `turns` are ascending, disjoint (start, end) with 1 <= start < end <= len(ids): `ids[:start]` is the prompt as the
    server encodes it, `ids[start:end]` the answer with its end-of-turn token. `line` counts from 1 in `source`.

    A pair of answers has one turn, the chosen answer, and `rejected`, another answer to the same prompt.
    """

    ids: tuple[int, ...]
    turns: tuple[tuple[int, int], ...]
    source: str
    line: int
    rejected: tuple[int, ...] = ()

    @property
    def answers(self) -> Iterator[tuple[int, Sequence[int]]]:
        """The prompt's length and the target ids of each answer."""
        for start, end in self.turns:
            yield start, self.ids[start:end]
        if self.rejected:
            yield self.turns[0][0], self.rejected

    @property
    def whole(self) -> "list[Sample]":
        """What one stream reads: the sample, of a pair both answers, each after its prompt."""
        if not self.rejected:
            return [self]
        start, _ = self.turns[0]
        other = Sample(self.ids[:start] + self.rejected, ((start, start + len(self.rejected)),), self.source, self.line)
        return [Sample(self.ids, self.turns, self.source, self.line), other]

    @property
    def context_len(self) -> int:
        """Number of tokens that the base reads: those before the last turn's first input, its prompt's last token."""
        return base_len(self.turns[-1][0])

    @property
    def answer_len(self) -> int:
        """Number of target tokens."""
        return sum(end - start for start, end in self.turns) + len(self.rejected)


@dataclass(frozen=True)
class Turn:
    """An answer to train on and its prompt."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Limits:
    """Maximum length of a sample, context and answer tokens that fit a row, and the number of the model's ids, which
    may be smaller than the tokenizer's (None: no limit). `stream_len` are the tokens that fit a row of one stream.
    """

    max_len: int
    context_len: int | None = None
    answer_len: int | None = None
    vocab_size: int | None = None
    stream_len: int | None = None

    def allow(self, turn: Turn, answers_before: int) -> bool:
        """Whether `turn` fits as the last turn of a sample that has `answers_before` target tokens."""
        return (
            len(turn.prompt) + len(turn.answer) <= self.max_len
            and (self.context_len is None or base_len(len(turn.prompt)) <= self.context_len)
            and (self.answer_len is None or answers_before + len(turn.answer) <= self.answer_len)
        )


def join_pair(chosen: Turn, rejected: Turn, limits: Limits, source: str, line: int) -> Sample | None:
    """The sample of two answers to the prompt of `chosen`; None if it exceeds the limits."""
    sample = Sample(
        tuple(chosen.prompt + chosen.answer),
        ((len(chosen.prompt), len(chosen.prompt) + len(chosen.answer)),),
        source,
        line,
        tuple(rejected.answer),
    )
    read = sum(next_position(len(each.ids)) for each in sample.whole)
    fits = limits.allow(chosen, len(rejected.answer)) and limits.allow(rejected, len(chosen.answer))
    return sample if fits and (limits.stream_len is None or read <= limits.stream_len) else None


def join_turns(turns: Iterable[Turn], limits: Limits, source: str, line: int) -> tuple[list[Sample], int]:
    """The samples of a conversation, and the number of turns that exceed the limits.

    A turn joins the previous sample if its prompt continues that sample's ids; otherwise it starts a new sample.
    """
    samples: list[Sample] = []
    ids: list[int] = []
    ranges: list[tuple[int, int]] = []
    too_long = 0
    for turn in turns:
        joins = bool(ranges) and turn.prompt[: len(ids)] == ids
        before = sum(end - start for start, end in ranges) if joins else 0
        if joins and not limits.allow(turn, before):
            joins, before = False, 0
        if not limits.allow(turn, before):
            too_long += 1
            continue
        if not joins and ranges:
            samples.append(Sample(tuple(ids), tuple(ranges), source, line))
        ids = turn.prompt + turn.answer
        ranges = [*(ranges if joins else []), (len(turn.prompt), len(ids))]
    if ranges:
        samples.append(Sample(tuple(ids), tuple(ranges), source, line))
    return samples, too_long
