"""The loader: epochs, mixture, exact resume with any number of workers, and workers that die."""

import json
import multiprocessing
import os
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_data import WatchedEpochs, chat, random_samples, sample_set, tokenizers, write_jsonl

from pshare_jax.errors import PshareError
from pshare_jax.training.data.batches import Layout, TwoStreamBatch
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig
from pshare_jax.training.data.epochs import Epochs
from pshare_jax.training.data.loader import Batches, evaluation_batches, training_batches
from pshare_jax.training.data.prepare import prepare

ROWS, CAPACITY = 2, (96, 48)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizers(tmp_path_factory.mktemp("tokenizers"))["llama"]


@pytest.fixture(scope="module")
def data():
    return sample_set(random_samples(1, 23), random_samples(2, 9))


def epochs_of(data, layout: Layout = "two_stream", seed=5, shuffle=True, rows=ROWS, capacity=CAPACITY):
    return Epochs(data, layout, rows, capacity, seed, shuffle)


def plain(batch):
    """A batch for bitwise comparison."""
    return ([(array.dtype.str, array.shape, array.tobytes()) for array in batch.arrays], *batch[1:])


def names(batches) -> Counter:
    return Counter(name for batch in batches for row in batch.samples for name in row)


def all_names(data) -> Counter:
    return Counter((sample.source, sample.line) for sample in data.store)


# --- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["two_stream", "one_stream"])
def test_every_epoch_uses_every_sample_once_in_its_own_order(data, layout):
    capacity = (128, 48)
    with Batches(epochs_of(data, layout, capacity=capacity), 3, 0) as loader:
        count = loader.num_batches()
        assert count is not None
        batches = [next(loader)]
        assert loader.num_batches() == count - 1
        batches += loader
        assert (len(batches), loader.num_batches()) == (count, 0)
    by_epoch = [[batch for batch in batches if batch.epoch == epoch] for epoch in range(3)]
    for epoch in by_epoch:
        assert names(epoch) == all_names(data)
        assert [batch.number for batch in epoch] == list(range(len(epoch)))
        assert [batch.is_last for batch in epoch] == [False] * (len(epoch) - 1) + [True]
        # The last batch is filled up with empty rows.
        weights = sum(batch.arrays.weights.sum() for batch in epoch)
        assert weights == sum(sample.answer_len for sample in data.store)
    orders = [[batch.samples for batch in epoch] for epoch in by_epoch]
    assert orders[0] != orders[1] != orders[2]
    assert len({array.shape for batch in batches for array in batch.arrays}) == 2
    again = list(Batches(epochs_of(data, layout, capacity=capacity), 3, 0))
    assert list(map(plain, again)) == list(map(plain, batches))
    other = next(Batches(epochs_of(data, layout, capacity=capacity, seed=6), 3, 0))
    assert plain(other) != plain(batches[0])


@given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0]), min_size=2, max_size=2), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_weights_are_passes_over_a_source(weights, seed):
    groups = (random_samples(1, 12), random_samples(2, 8))
    groups = tuple([type(s)(s.ids, s.turns, f"group{g}", s.line) for s in group] for g, group in enumerate(groups))
    data = sample_set(*groups, weights=tuple(weights))
    batches = list(Batches(epochs_of(data, seed=seed), 4, 0))
    for epoch in range(4):
        used = names(batch for batch in batches if batch.epoch == epoch)
        for group, weight in enumerate(weights):
            counts = [used[f"group{group}", line] for line in range(1, len(groups[group]) + 1)]
            assert sum(counts) == weight * len(counts)
            assert max(counts) - min(counts) <= 1 or weight % 1
    # Whole passes use every sample equally often.
    used = names(batches)
    for group, weight in enumerate(weights):
        assert {used[f"group{group}", line] for line in range(1, len(groups[group]) + 1)} == {int(4 * weight)}


def test_endless_data(data):
    with Batches(epochs_of(data), None, 0) as loader:
        assert loader.num_batches() is None
        batches = [next(loader) for _ in range(40)]
    assert batches[-1].epoch >= 2
    assert names(batch for batch in batches if batch.epoch == 1) == all_names(data)


def test_fill_is_the_fraction_of_tokens(data):
    epochs = epochs_of(data)
    batches = list(Batches(epochs, 1, 0))
    real, places = 0, 0
    for batch in batches:
        assert isinstance(batch.arrays, TwoStreamBatch)
        for segments in (batch.arrays.context_segments, batch.arrays.decode_segments):
            real, places = real + int((segments > 0).sum()), places + segments.size
    assert epochs.fill() == pytest.approx(real / places)


def test_evaluation_is_one_pass_in_one_order(data):
    config = DataConfig([SourceConfig("x")], batch=RowsConfig(rows=3), epochs=5, num_workers=2)
    one, two = (list(evaluation_batches(data, config, "two_stream")) for _ in range(2))
    assert list(map(plain, one)) == list(map(plain, two))
    assert names(one) == all_names(data)


# --- resume ----------------------------------------------------------------------------------------------------------


def test_resume_at_every_step_equals_the_straight_run(data):
    """A5-10: across epochs, also in a loader that has started."""
    loader = Batches(epochs_of(data), 3, 0)
    states, straight = [loader.get_state()], []
    for batch in loader:
        straight.append(plain(batch))
        states.append(loader.get_state())
    assert len(straight) >= 12
    for step, state in enumerate(states):
        with Batches(epochs_of(data), 3, 0) as other:
            next(other)
            other.set_state(state)
            assert [plain(batch) for batch in other] == straight[step:]
    assert states[-1]["epoch"] == 3
    with Batches(epochs_of(data), None, 0) as longer:
        # A finished run can be extended.
        longer.set_state(states[-1])
        assert next(longer).epoch == 3


def test_workers_give_the_same_batches_and_resume_into_any_number_of_them(data):
    """A5-10, A5-12: batches and states, across epochs and to the end."""
    loader = Batches(epochs_of(data), 3, 0)
    straight, states = [], [loader.get_state()]
    for batch in loader:
        straight.append(plain(batch))
        states.append(json.loads(json.dumps(loader.get_state())))
    with Batches(epochs_of(data), 3, 2) as loader:
        loader.set_state(states[3])
        for step in range(3, len(straight)):
            assert loader.get_state() == states[step]
            assert plain(next(loader)) == straight[step]
        assert loader.get_state() == states[-1]
        assert next(loader, None) is None


def test_more_workers_than_batches_and_none_left():
    """No batch is left after the last state, and data may have fewer batches than workers."""
    data = sample_set(random_samples(1, 2))
    with Batches(epochs_of(data, capacity=(200, 100)), 1, 2) as loader:
        assert len(list(loader)) == 1
        loader.set_state(loader.get_state())
        assert list(loader) == []


def test_rows_may_change_between_two_epochs_only(data):
    """From there on, the batches are those of a run that had the new number of rows all along."""
    with Batches(epochs_of(data), 3, 0) as loader:
        states, is_last = [], []
        for batch in loader:
            states.append(loader.get_state())
            is_last.append(batch.is_last)
    whole = list(Batches(epochs_of(data, rows=3), 3, 0))
    for state, at_border in zip(states, is_last, strict=True):
        with Batches(epochs_of(data, rows=3), 3, 0) as loader:
            if not at_border:
                with pytest.raises(PshareError, match=rf"between two epochs.*data\.batch\.rows={ROWS}\."):
                    loader.set_state(state)
                continue
            loader.set_state(state)
            rest = list(loader)
        expected = [batch for batch in whole if batch.epoch >= state["epoch"]]
        assert [batch.samples for batch in rest] == [batch.samples for batch in expected]
    assert is_last.count(True) == 3


def test_other_data_or_settings_are_refused(data):
    state = Batches(epochs_of(data), 3, 0).get_state()
    other = sample_set(random_samples(1, 23), random_samples(3, 9))
    for epochs, name in (
        (epochs_of(data, seed=6), r"seed.*\(5, now 6\)"),
        (epochs_of(data, capacity=(97, 48)), "lengths"),
        (epochs_of(data, "one_stream"), "layout"),
        (epochs_of(data, shuffle=False), "shuffle"),
        (epochs_of(other), "samples"),
        (epochs_of(sample_set(random_samples(1, 23), random_samples(2, 9), weights=(1.0, 2.0))), "weights"),
    ):
        with pytest.raises(PshareError, match=name):
            Batches(epochs, 3, 0).set_state(state)


# --- workers ---------------------------------------------------------------------------------------------------------


def test_workers_do_not_start_jax_and_a_dead_one_is_an_error(data, tmp_path):
    epochs = WatchedEpochs(data, "two_stream", ROWS, CAPACITY, 5, True)
    epochs.folder = tmp_path
    with Batches(epochs, None, 1) as loader:
        next(loader)
        started = dict(path.name.split() for path in tmp_path.iterdir())
        assert len(started) == 1
        assert str(os.getpid()) not in started
        assert set(started.values()) == {"False"}
        (tmp_path / "die").touch()
        with pytest.raises(PshareError, match="worker process"):
            list(islice(loader, 100))
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


def test_from_a_file_to_batches(tok, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("q" * n, "a" * n)} for n in range(1, 60)])
    for layout in ("two_stream", "one_stream"):
        config = DataConfig([SourceConfig(path)], epochs=2, batch=RowsConfig(rows=2))
        found = prepare(config, tok, tok.eos_ids, layout)
        with training_batches(found.train, config, layout) as loader:
            batches = list(loader)
        assert set(names(batches).values()) == {2}
        assert len(names(batches)) == 59
        small = DataConfig([SourceConfig(path)], batch=RowsConfig(context_len=40, answer_len=30))
        found = prepare(small, tok, tok.eos_ids, layout)
        assert 0 < len(found.train) < 59
        with training_batches(found.train, small, layout) as loader:
            assert loader.epochs.identity["lengths"] == [40, 30]
            assert np.sum([batch.arrays.weights.sum() for batch in loader]) == found.train.store.answer_lens.sum()
