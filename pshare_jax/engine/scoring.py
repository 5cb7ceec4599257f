"""Scoring steps: a decode module reads tokens, for their log-probabilities or to have their KV.

The decode worker runs them before a sequence generates, and again where KV was lost in a failure, for what the module had
consumed by then. This module prepares their inputs; model/paged_batch.py (`ScoreBatch`) describes what they compute.
"""

from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from pshare_jax.engine.request import TokenLogprobs
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.shapes import Shape, padded_batch
from pshare_jax.model.paged_batch import ScoreBatch

SCORE_TOKENS = 64
"""Tokens of a step: longer steps would delay the worker's running answers."""
SHAPE: Shape = ("score", 1)
SHORT: Shape = ("score", 4)
"""A step of one sequence, and one of four that have few tokens left: both take as long."""
UNAVAILABLE = (
    "The server could not compile its scoring step, which echo with logprobs, response_start, activated LoRA and requests that "
    "go on after a failure need; its log says why."
)


def size_of(shape: Shape) -> tuple[int, int]:
    """Rows and tokens of a row of a scoring step of this shape."""
    num_rows = int(shape[1])
    return num_rows, SCORE_TOKENS // num_rows


def batch_of(waiting: Items[Sequence], shapes: Any) -> list[Sequence]:
    """The sequences of the next step, the most urgent first: it alone, or those like it if all have few tokens left.

    `shapes` are the shapes that may be used.
    """
    most, num_tokens = size_of(SHORT)
    first = waiting[0]
    if SHORT not in shapes or not 0 < _num_left(first) <= num_tokens:
        return [first]
    return [s for s in waiting if s.scoring_group == first.scoring_group and 0 < _num_left(s) <= num_tokens][:most]


def no_rows(shape: Shape, table_len: int) -> tuple[np.ndarray, ScoreBatch]:
    """Tokens `[rows, tokens]` and metadata of a step on padding alone."""
    tokens, batch = padded_batch(size_of(shape), table_len)
    return tokens, ScoreBatch(batch, np.zeros_like(tokens), np.array(False))


def next_rows(sequences: Items[Sequence], shape: Shape, table_len: int) -> tuple[np.ndarray, ScoreBatch, list[int]]:
    """Tokens, metadata and the numbers of real tokens of the sequences' next step, all of one scoring group."""
    num_rows, num_tokens = size_of(shape)
    chunks, spans = [], []
    for sequence in sequences:
        (start, end), held = sequence.to_score, sequence.decode.table
        assert held is not None
        spans.append((start, min(end, start + num_tokens)))
        chunks.append((held.pages, start, sequence.tokens(*spans[-1]), sequence.slot))
    tokens, batch = padded_batch((num_rows, num_tokens), table_len, chunks)
    targets = np.zeros_like(tokens)
    for row, (sequence, (start, end)) in enumerate(zip(sequences, spans, strict=True)):
        targets[row, : end - start] = sequence.tokens(start + 1, end + 1)
    return (
        tokens,
        ScoreBatch(batch, targets, np.array(sequences[0].scoring_group[1])),
        [end - start for start, end in spans],
    )


def reported(sequence: Sequence, row: int, scores: Any, num_tokens: int) -> list[TokenLogprobs]:
    """A step's scores of a row's real tokens, on the host."""
    start, wanted = sequence.to_score[0], sequence.request.logprobs or 0
    logprobs, top_ids, top_logprobs = (np.asarray(array)[row] for array in scores)
    targets = sequence.tokens(start + 1, start + 1 + num_tokens)
    return [
        TokenLogprobs.of(target, logprobs[index], top_ids[index], top_logprobs[index], wanted)
        for index, target in enumerate(targets)
    ]


def _num_left(sequence: Sequence) -> int:
    start, end = sequence.to_score
    return end - start
