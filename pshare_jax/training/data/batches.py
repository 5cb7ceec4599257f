"""Arrays of a batch from rows of samples, in NumPy: one function for each batch layout.

A row holds packed samples, distinguished by segment numbers from 1; segment 0 is padding. Positions count within the
sample. Padding is zero everywhere.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from pshare_jax.share.boundary import base_len, next_position
from pshare_jax.training.data.samples import Sample

Layout = Literal["two_stream", "one_stream"]


class TwoStreamBatch(NamedTuple):
    """For `prefillshare`: the base reads the context stream, the decode module the decode stream.

    For a turn (start, end) the decode stream holds `end - start` tokens beginning with the prompt's last token, and
    predicts `ids[start:end]`. It attends to its segment's context at positions < `decode_prefix` (= base_len(start))
    and to its own turn. `decode_turns` numbers the turns of a row from 1. `weights` is 1 for targets, 0 for padding.
    """

    context_tokens: Int32[np.ndarray, "B C"]
    context_positions: Int32[np.ndarray, "B C"]
    context_segments: Int32[np.ndarray, "B C"]
    decode_tokens: Int32[np.ndarray, "B D"]
    decode_positions: Int32[np.ndarray, "B D"]
    decode_segments: Int32[np.ndarray, "B D"]
    decode_turns: Int32[np.ndarray, "B D"]
    decode_prefix: Int32[np.ndarray, "B D"]
    targets: Int32[np.ndarray, "B D"]
    weights: Float32[np.ndarray, "B D"]


class OneStreamBatch(NamedTuple):
    """For `full_ft`: one stream, whose logits at `picks` (indices into the row) predict `targets`."""

    tokens: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    segments: Int32[np.ndarray, "B T"]
    picks: Int32[np.ndarray, "B R"]
    targets: Int32[np.ndarray, "B R"]
    weights: Float32[np.ndarray, "B R"]


def two_stream(rows: Sequence[Sequence[Sample]], context_len: int, decode_len: int) -> TwoStreamBatch:
    """The batch of `rows`, with C = context_len and D = decode_len. The answers of a pair are two turns over one context.

    Raises:
        ValueError: a row does not fit.
    """
    shape_c, shape_d = (len(rows), context_len), (len(rows), decode_len)
    context = [np.zeros(shape_c, np.int32) for _ in range(3)]
    decode = [np.zeros(shape_d, np.int32) for _ in range(6)]
    batch = TwoStreamBatch._make([*context, *decode, np.zeros(shape_d, np.float32)])
    for b, row in enumerate(rows):
        context_at, decode_at, turn = _Cursor(context_len), _Cursor(decode_len), 0
        for segment, sample in enumerate(row, start=1):
            ids = np.asarray(sample.ids, np.int32)
            at = context_at.take(sample.context_len)
            batch.context_tokens[b, at] = ids[: sample.context_len]
            batch.context_positions[b, at] = np.arange(sample.context_len)
            batch.context_segments[b, at] = segment
            for start, answer in sample.answers:
                turn += 1
                at, first, num = decode_at.take(len(answer)), base_len(start), len(answer)
                batch.decode_tokens[b, at] = (ids[first], *answer[:-1])
                batch.decode_positions[b, at] = np.arange(first, first + num)
                batch.decode_segments[b, at] = segment
                batch.decode_turns[b, at] = turn
                batch.decode_prefix[b, at] = first
                batch.targets[b, at] = answer
                batch.weights[b, at] = 1
    return batch


def one_stream(rows: Sequence[Sequence[Sample]], length: int, answers_len: int) -> OneStreamBatch:
    """The batch of `rows`, with T = length and R = answers_len; a sample's last token is only a target. The answers of a pair
    have a segment each.

    Raises:
        ValueError: a row does not fit.
    """
    stream = [np.zeros((len(rows), length), np.int32) for _ in range(3)]
    answers = [np.zeros((len(rows), answers_len), np.int32) for _ in range(2)]
    batch = OneStreamBatch._make([*stream, *answers, np.zeros((len(rows), answers_len), np.float32)])
    for b, row in enumerate(rows):
        stream_at, answers_at = _Cursor(length), _Cursor(answers_len)
        for segment, sample in enumerate([part for each in row for part in each.whole], start=1):
            num_tokens = next_position(sample.turns[-1][1])
            ids = np.asarray(sample.ids, np.int32)
            at = stream_at.take(num_tokens)
            batch.tokens[b, at] = ids[:num_tokens]
            batch.positions[b, at] = np.arange(num_tokens)
            batch.segments[b, at] = segment
            for start, end in sample.turns:
                picked = answers_at.take(end - start)
                batch.picks[b, picked] = at.start + base_len(start) + np.arange(end - start)
                batch.targets[b, picked] = ids[start:end]
                batch.weights[b, picked] = 1
    return batch


def as_one_stream(batch: TwoStreamBatch) -> OneStreamBatch:
    """The batch as one stream, in which a model reads all tokens itself: that of `one_stream` with length C + D, which fits, and
    answers_len D.
    """
    row = np.arange(len(batch.targets))[:, None]
    # Tokens of each segment in the context stream; segment 0 is padding.
    counts = np.zeros((len(row), int(max(batch.context_segments.max(), batch.decode_segments.max())) + 1), np.int32)
    np.add.at(counts, (row, batch.context_segments), 1)
    counts[:, 0] = 0
    # Inputs of a sample's last turn follow its context; those of earlier turns are in it.
    is_last = (batch.decode_segments > 0) & (batch.decode_prefix == counts[row, batch.decode_segments])
    segments = np.concatenate([batch.context_segments, np.where(is_last, batch.decode_segments, 0)], axis=1)
    positions = np.concatenate([batch.context_positions, batch.decode_positions], axis=1)
    tokens = np.concatenate([batch.context_tokens, batch.decode_tokens], axis=1)
    order = np.lexsort((positions, segments, segments == 0))
    tokens, positions, stream = (np.where(segments > 0, part, 0)[row, order] for part in (tokens, positions, segments))
    np.add.at(counts, (row, batch.decode_segments), is_last)
    starts = np.cumsum(counts, axis=1) - counts
    picks = np.where(batch.weights > 0, starts[row, batch.decode_segments] + batch.decode_positions, 0)
    return OneStreamBatch(tokens, positions, stream, picks.astype(np.int32), batch.targets, batch.weights)


class _Cursor:
    """The next free position of a row of length `size`."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def take(self, count: int) -> slice:
        span = slice(self._at, self._at + count)
        if span.stop > self._size:
            raise ValueError(f"the samples of a row need {span.stop} positions, but it has {self._size}")
        self._at = span.stop
        return span
