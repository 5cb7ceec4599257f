"""Batch layouts and packing: every token at its position, samples separated, rows within their limits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_data import random_samples

from pshare_jax.training.data.batches import OneStreamBatch, as_one_stream, one_stream, two_stream
from pshare_jax.training.data.packing import WINDOW, choose_capacity, fill, pack
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.data.store import SampleStore, write_samples

pytestmark = pytest.mark.host

SHAPES = st.tuples(st.integers(0, 1000), st.lists(st.integers(0, 4), min_size=1, max_size=4))


def rows_of(shape):
    seed, sizes = shape
    return [random_samples(seed + row, size) for row, size in enumerate(sizes)]


def needs(rows, layout):
    first = (lambda s: s.context_len) if layout == "two_stream" else (lambda s: len(s.ids) - 1)
    return max(sum(map(first, row)) for row in rows), max(sum(s.answer_len for s in row) for row in rows)


def test_one_sample_by_hand():
    sample = Sample((10, 11, 12, 13, 14, 15, 16), ((2, 4), (5, 7)), "a", 1)
    batch = two_stream([[sample]], 5, 5)
    assert batch.context_tokens.tolist() == [[10, 11, 12, 13, 0]]
    assert batch.context_positions.tolist() == [[0, 1, 2, 3, 0]]
    assert batch.context_segments.tolist() == [[1, 1, 1, 1, 0]]
    assert batch.decode_tokens.tolist() == [[11, 12, 14, 15, 0]]
    assert batch.decode_positions.tolist() == [[1, 2, 4, 5, 0]]
    assert batch.decode_segments.tolist() == [[1, 1, 1, 1, 0]]
    assert batch.decode_turns.tolist() == [[1, 1, 2, 2, 0]]
    assert batch.decode_prefix.tolist() == [[1, 1, 4, 4, 0]]
    assert batch.targets.tolist() == [[12, 13, 15, 16, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 1, 0]]
    stream = one_stream([[sample]], 7, 5)
    assert stream.tokens.tolist() == [[10, 11, 12, 13, 14, 15, 0]]
    assert stream.picks.tolist() == [[1, 2, 4, 5, 0]]
    assert stream.targets.tolist() == [[12, 13, 15, 16, 0]]
    assert stream.weights.tolist() == [[1, 1, 1, 1, 0]]
    tokens = (*batch._asdict().values(), *stream._asdict().values())
    assert {array.dtype.name for array in tokens} == {"int32", "float32"}


@given(SHAPES, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_two_streams_contain_every_sample_once(shape, spare_context, spare_answers):
    rows = rows_of(shape)
    context, answers = needs(rows, "two_stream")
    batch = two_stream(rows, context + spare_context, answers + spare_answers)
    assert batch.context_tokens.shape == (len(rows), context + spare_context)
    for b, row in enumerate(rows):
        turn = 0
        for segment, sample in enumerate(row, start=1):
            at = batch.context_segments[b] == segment
            assert batch.context_tokens[b, at].tolist() == list(sample.ids[: sample.turns[-1][0] - 1])
            assert batch.context_positions[b, at].tolist() == list(range(sample.turns[-1][0] - 1))
            for start, end in sample.turns:
                turn += 1
                at = batch.decode_turns[b] == turn
                assert set(batch.decode_segments[b, at].tolist()) == {segment}
                assert batch.decode_tokens[b, at].tolist() == list(sample.ids[start - 1 : end - 1])
                assert batch.decode_positions[b, at].tolist() == list(range(start - 1, end - 1))
                assert set(batch.decode_prefix[b, at].tolist()) == {start - 1}
                assert batch.targets[b, at].tolist() == list(sample.ids[start:end])
                assert batch.weights[b, at].tolist() == [1] * (end - start)
        real = batch.decode_turns[b] > 0
        assert real.sum() == batch.weights[b].sum() == sum(sample.answer_len for sample in row)
        for array in batch[3:]:
            assert not array[b, ~real].any()
        for array in batch[:3]:
            assert not array[b, batch.context_segments[b] == 0].any()
    for short in ((context - 1, answers), (context, answers - 1)):
        if min(short) >= 0:
            with pytest.raises(ValueError, match="positions"):
                two_stream(rows, *short)


@given(SHAPES)
@settings(max_examples=60, deadline=None)
def test_one_stream_picks_the_positions_that_predict_the_answers(shape):
    rows = rows_of(shape)
    length, answers = needs(rows, "one_stream")
    batch = one_stream(rows, length + 2, answers + 1)
    for b, row in enumerate(rows):
        for segment, sample in enumerate(row, start=1):
            at = batch.segments[b] == segment
            assert batch.tokens[b, at].tolist() == list(sample.ids[:-1])
            assert batch.positions[b, at].tolist() == list(range(len(sample.ids) - 1))
        real = batch.weights[b] == 1
        assert not batch.picks[b, ~real].any()
        picked = batch.picks[b, real]
        expected = [
            (segment, start - 1 + k, sample.ids[start - 1 + k], sample.ids[start + k])
            for segment, sample in enumerate(row, start=1)
            for start, end in sample.turns
            for k in range(end - start)
        ]
        found = (batch.segments[b, picked], batch.positions[b, picked], batch.tokens[b, picked], batch.targets[b, real])
        assert list(zip(*(array.tolist() for array in found), strict=True)) == expected


def test_masks_depend_on_positions_and_not_on_ids():
    """A5-04: ids that equal padding or an end token are trained within answers, and only there."""
    sample = Sample((2, 0, 2, 0, 2), ((1, 3), (4, 5)), "a", 1)
    batch = two_stream([[sample]], 8, 8)
    assert batch.targets[0, :3].tolist() == [0, 2, 2]
    assert batch.weights[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


# --- packing ---------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=60),
    st.integers(30, 70),
    st.integers(9, 30),
    st.none() | st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_packing_uses_every_sample_once_within_both_limits(sizes, context, answers, seed):
    lengths = np.array(sizes, np.int64).reshape(-1, 2)
    rng = None if seed is None else np.random.PCG64(seed)
    rows = pack(lengths, (context, answers), rng)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    for row in rows:
        assert row
        assert (lengths[row].sum(axis=0) <= (context, answers)).all()
    # First fit: no two rows of a window would fit into a single row.
    totals = [lengths[row].sum(axis=0) for row in rows]
    for i, total in enumerate(totals):
        for other in totals[:i]:
            assert (total + other > (context, answers)).any()


def test_packing_rejects_a_sample_larger_than_a_row():
    for lengths in ([[5, 3]], [[1, 9]]):
        with pytest.raises(ValueError, match="larger than a row"):
            pack(np.array(lengths), (4, 8))


def test_rows_are_shuffled_within_their_window():
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(1, 100, 3 * WINDOW), rng.integers(1, 30, 3 * WINDOW)], axis=1)
    rows = pack(lengths, (200, 60), np.random.PCG64(0))
    windows = [{index // WINDOW for index in row} for row in rows]
    assert all(len(window) == 1 for window in windows)
    sizes = np.array([lengths[row].max() for row in rows if max(row) < WINDOW])
    half = len(sizes) // 2
    assert abs(sizes[:half].mean() - sizes[half:].mean()) < 5
    assert rows == pack(lengths, (200, 60), np.random.PCG64(0))
    assert rows != pack(lengths, (200, 60), np.random.PCG64(1))


def realistic(seed: int, kind: str) -> np.ndarray:
    """Context and answer tokens of conversations with log-normal turns, as in public chat and tool-calling data."""
    rng = np.random.default_rng(seed)
    question, answer, most_turns = {
        "chat": ((3.5, 1.0), (5.2, 0.8), 6),
        "math": ((4.2, 0.5), (5.0, 0.5), 1),
        "tools": ((5.8, 0.6), (3.6, 0.5), 8),
    }[kind]
    lengths = []
    while len(lengths) < 4000:
        turns = int(rng.integers(1, most_turns + 1))
        questions = rng.lognormal(*question, turns).astype(int) + 8
        answers = rng.lognormal(*answer, turns).astype(int) + 2
        if questions.sum() + answers.sum() <= 4096:
            lengths.append((questions.sum() + answers[:-1].sum(), answers.sum()))
    return np.array(lengths, np.int64)


@pytest.mark.parametrize("kind", ["chat", "math", "tools"])
def test_rows_are_at_least_85_percent_tokens(kind):
    lengths = realistic(0, kind)
    stream = np.stack([lengths.sum(axis=1), lengths[:, 1]], axis=1)
    for needed in (lengths, stream):
        capacity = choose_capacity(needed, None, None)
        rows = pack(needed, capacity, np.random.PCG64(0))
        share = fill(needed, len(rows), capacity)
        print(kind, capacity, round(share, 3))
        assert share >= 0.85
        assert all(length % 32 == 0 for length in capacity)


def test_given_lengths_are_kept():
    lengths = realistic(1, "chat")
    assert choose_capacity(lengths, 4100, 5000) == (4100, 5000)
    context, answers = choose_capacity(lengths, 8192, None)
    assert context == 8192
    assert answers >= lengths[:, 1].max()
    context, answers = choose_capacity(lengths, None, 5000)
    assert answers == 5000
    assert context >= lengths[:, 0].max()
    assert choose_capacity(np.array([[0, 2]]), None, None) == (32, 32)


@given(SHAPES, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_two_streams_as_one_are_the_batch_of_one_stream(shape, spare_context, spare_answers):
    rows = rows_of(shape)
    context, answers = (max(1, need) for need in needs(rows, "two_stream"))
    context, answers = context + spare_context, answers + spare_answers
    ours, expected = as_one_stream(two_stream(rows, context, answers)), one_stream(rows, context + answers, answers)
    for name, x, y in zip(OneStreamBatch._fields, ours, expected, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=name)


def test_the_answers_of_a_pair_share_a_context_or_have_a_stream_each(tmp_path):
    pair = Sample((1, 2, 3, 4, 5), ((3, 5),), "test", 1, (6, 7, 8))
    two = two_stream([[pair]], 4, 6)
    assert two.context_tokens.tolist() == [[1, 2, 0, 0]]
    assert two.decode_tokens.tolist() == [[3, 4, 3, 6, 7, 0]]
    assert two.decode_positions.tolist() == [[2, 3, 2, 3, 4, 0]]
    assert two.decode_turns.tolist() == [[1, 1, 2, 2, 2, 0]]
    assert two.decode_prefix.tolist() == [[2, 2, 2, 2, 2, 0]]
    one = one_stream([[pair]], 10, 6)
    assert one.tokens.tolist() == [[1, 2, 3, 4, 1, 2, 3, 6, 7, 0]]
    assert one.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]]
    assert two.targets.tolist() == one.targets.tolist() == [[4, 5, 6, 7, 8, 0]]
    assert (pair.context_len, pair.answer_len) == (2, 5)
    write_samples(tmp_path, enumerate([pair]))
    store = SampleStore(tmp_path)
    assert (list(store), store.stream_lens.tolist(), store.answer_lens.tolist()) == ([pair], [9], [5])
