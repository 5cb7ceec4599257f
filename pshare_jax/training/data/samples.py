"""A training sample, and how it is cut from the turns of one conversation.

`records.py` makes turns (a prompt as the server sees it, the answer that should follow); here they become as few
samples as possible: all turns that the served prompts contain word for word share one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pshare_jax.share.boundary import base_len


@dataclass(frozen=True)
class Sample:
    """Token ids with the ranges to train.

    `turns` are ascending, disjoint (start, end) with 1 <= start < end <= len(ids): `ids[:start]` is the prompt as the
    server encodes it, `ids[start:end]` the answer with its end-of-turn token. `line` counts from 1 in `source`.
    """

    ids: tuple[int, ...]
    turns: tuple[tuple[int, int], ...]
    source: str
    line: int

    @property
    def context_len(self) -> int:
        """Tokens that only the base reads: all before the last turn's first input, which is its prompt's last token."""
        return base_len(self.turns[-1][0])

    @property
    def answer_len(self) -> int:
        """Trained tokens."""
        return sum(end - start for start, end in self.turns)


@dataclass(frozen=True)
class Turn:
    """One answer to train and the prompt before it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Limits:
    """Most ids of a sample, most context and answer tokens that a row of a batch can hold, and how many ids the model has,
    which may be fewer than the tokenizer's (None: no limit).
    """

    max_len: int
    context_len: int | None = None
    answer_len: int | None = None
    vocab_size: int | None = None

    def allow(self, turn: Turn, answers_before: int) -> bool:
        """Whether `turn` fits as the last of a sample that already trains `answers_before` tokens."""
        return (
            len(turn.prompt) + len(turn.answer) <= self.max_len
            and (self.context_len is None or base_len(len(turn.prompt)) <= self.context_len)
            and (self.answer_len is None or answers_before + len(turn.answer) <= self.answer_len)
        )


def joined(turns: Iterable[Turn], limits: Limits, source: str, line: int) -> tuple[list[Sample], int]:
    """The samples of one conversation, and how many turns were left out because they do not fit.

    A turn joins the sample before it if its prompt goes on from that sample's ids; otherwise it starts a new one.
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
