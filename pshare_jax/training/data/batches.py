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
    """The batch of `rows`, with C = context_len and D = decode_len.

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
            for start, end in sample.turns:
                turn += 1
                at, first, num = decode_at.take(end - start), base_len(start), end - start
                batch.decode_tokens[b, at] = ids[first : first + num]
                batch.decode_positions[b, at] = np.arange(first, first + num)
                batch.decode_segments[b, at] = segment
                batch.decode_turns[b, at] = turn
                batch.decode_prefix[b, at] = first
                batch.targets[b, at] = ids[start:end]
                batch.weights[b, at] = 1
    return batch


def one_stream(rows: Sequence[Sequence[Sample]], length: int, answers_len: int) -> OneStreamBatch:
    """The batch of `rows`, with T = length and R = answers_len; a sample's last token is only a target.

    Raises:
        ValueError: a row does not fit.
    """
    stream = [np.zeros((len(rows), length), np.int32) for _ in range(3)]
    answers = [np.zeros((len(rows), answers_len), np.int32) for _ in range(2)]
    batch = OneStreamBatch._make([*stream, *answers, np.zeros((len(rows), answers_len), np.float32)])
    for b, row in enumerate(rows):
        stream_at, answers_at = _Cursor(length), _Cursor(answers_len)
        for segment, sample in enumerate(row, start=1):
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
