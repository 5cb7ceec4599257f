"""The loader: epochs, mixture, the split, exact resume with any number of workers, and workers that die."""

import json
import multiprocessing
import os
import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_data import WatchedEpochs, chat, random_samples, sample_set, tokenizers, write_jsonl

from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings
from pshare_jax.training.data.batches import Layout, TwoStreamBatch
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig, check_data
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
    """All of a batch, for comparison bit by bit."""
    return ([(array.dtype.str, array.shape, array.tobytes()) for array in batch.arrays], *batch[1:])


def names(batches) -> Counter:
    return Counter(name for batch in batches for row in batch.samples for name in row)


def all_names(data) -> Counter:
    return Counter((sample.source, sample.line) for sample in data.store)


# --- epochs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["two_stream", "one_stream"])
def test_every_sample_is_used_once_an_epoch_in_an_order_of_its_own(data, layout):
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
        # The last batch's missing rows are empty.
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
    # Over whole passes every sample was used as often.
    used = names(batches)
    for group, weight in enumerate(weights):
        assert {used[f"group{group}", line] for line in range(1, len(groups[group]) + 1)} == {int(4 * weight)}


def test_endless_data_goes_on(data):
    with Batches(epochs_of(data), None, 0) as loader:
        assert loader.num_batches() is None
        batches = [next(loader) for _ in range(40)]
    assert batches[-1].epoch >= 2
    assert names(batch for batch in batches if batch.epoch == 1) == all_names(data)


def test_filling_is_reported(data):
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
    """A5-10: across epochs, also from a loader that is in the middle of its work."""
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
        # A run that was over can be given more epochs.
        longer.set_state(states[-1])
        assert next(longer).epoch == 3


def test_workers_give_the_same_batches_and_resume_into_any_number_of_them(data):
    """A5-10, A5-12: the states, too; over an epoch border and to the end."""
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
    """The last state of a run has nothing more; a data set may be smaller than the number of workers."""
    data = sample_set(random_samples(1, 2))
    with Batches(epochs_of(data, capacity=(200, 100)), 1, 2) as loader:
        assert len(list(loader)) == 1
        loader.set_state(loader.get_state())
        assert list(loader) == []


def test_other_data_or_settings_are_refused(data):
    state = Batches(epochs_of(data), 3, 0).get_state()
    other = sample_set(random_samples(1, 23), random_samples(3, 9))
    for epochs, name in (
        (epochs_of(data, seed=6), r"seed are not the same \(5, now 6\)"),
        (epochs_of(data, rows=3), "rows"),
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
        with pytest.raises(PshareError, match="worker process of the data loader failed"):
            list(islice(loader, 100))
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


def test_a_store_reads_the_same_in_another_process_and_cleans_up():
    samples = random_samples(3, 30)
    data = sample_set(samples)
    copy = pickle.loads(pickle.dumps(data.store))
    assert list(copy) == list(data.store) == samples
    assert copy[3:5] == samples[3:5]
    for index in (-1, 30):
        with pytest.raises(IndexError):
            copy[index]
    assert len(pickle.dumps(sample_set(random_samples(3, 30, longest=4000)).store)) < 5000
    path = data.store._path
    assert path.exists()
    del data
    assert not path.parent.exists()


# --- the split -------------------------------------------------------------------------------------------------------


def test_the_split_keeps_records_and_equal_records_on_one_side(tok, tmp_path):
    records = [{"messages": chat(f"q{index % 60}", "a", "r", f"b{index % 60}")} for index in range(80)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    config = DataConfig([SourceConfig(path)], eval_fraction=0.1, batch=RowsConfig(answer_len=4))
    found = prepare(config, tok, tok.eos_ids)
    sides = [{found.train.store[int(i)].line for i in part.members[0]} for part in (found.train, found.evaluation)]
    assert sides[0] | sides[1] == set(range(1, 81))
    assert not sides[0] & sides[1]
    assert 8 <= len(sides[1]) <= 9
    assert not {(line - 1) % 60 for line in sides[0]} & {(line - 1) % 60 for line in sides[1]}
    # Each record is two samples here.
    assert len(found.train) == 2 * len(sides[0])
    again = prepare(config, tok, tok.eos_ids)
    assert [m.tolist() for m in again.evaluation.members] == [m.tolist() for m in found.evaluation.members]
    # The same answer after the same prompt, in another record: q0 -> a is not, so nothing leaks.
    assert found.report.leaked == 0
    with Batches(epochs_of(found.train), 1, 0) as loader:
        assert {line for _, line in names(loader)} == sides[0]
    with pytest.raises(PshareError, match="leaves no training record"):
        prepare(
            DataConfig([SourceConfig(write_jsonl(tmp_path / "b.jsonl", records[:1]))], eval_fraction=0.5),
            tok,
            tok.eos_ids,
        )


def test_answers_on_both_sides_are_counted(tok, tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("q", "a", "r", "b")}, {"messages": chat("s", "c")}])
    held = [chat("q", "a"), chat("q", "other"), chat("s", "c"), chat("q", "a", "r", "b"), chat("r", "b")]
    held_out = write_jsonl(tmp_path / "b.jsonl", [{"messages": messages} for messages in held])
    config = DataConfig([SourceConfig(train)], eval_sources=[SourceConfig(held_out)])
    found = prepare(config, tok, tok.eos_ids)
    assert (len(found.train), len(found.evaluation)) == (2, 5)
    assert found.report.leaked == 4
    assert "4 evaluation answers are also in training" in str(found.report)


# --- the config ------------------------------------------------------------------------------------------------------


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


def test_the_config_in_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "sources: [{path: 'reasoning_gym:leg_counting?seed=1'}, {path: [a.jsonl, b/*.parquet], weight: 2}]\nepochs: null\n"
    )
    config = load_settings(DataConfig, tmp_path / "a.yaml", ["batch.rows=8", "eval_fraction=0.1"])
    check_data(config)
    assert config.sources[1] == SourceConfig(["a.jsonl", "b/*.parquet"], 2.0)
    assert (config.epochs, config.batch, config.eval_fraction) == (None, RowsConfig(8), 0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sources": []}, r"data\.sources is empty"),
        ({"sources": [SourceConfig("")]}, r"data\.sources\.0\.path is empty"),
        ({"sources": [SourceConfig([])]}, r"data\.sources\.0\.path is empty"),
        ({"sources": [SourceConfig("a", weight=0.0)]}, r"data\.sources\.0\.weight must be more than 0"),
        ({"eval_sources": [SourceConfig("a", weight=float("nan"))]}, r"data\.eval_sources\.0\.weight"),
        ({"max_len": 2}, r"data\.max_len must be at least 3, not 2"),
        ({"batch": RowsConfig(rows=0)}, r"data\.batch\.rows"),
        ({"batch": RowsConfig(context_len=0)}, r"data\.batch\.context_len"),
        ({"batch": RowsConfig(answer_len=-1)}, r"data\.batch\.answer_len"),
        ({"epochs": 0}, r"data\.epochs"),
        ({"num_workers": -1}, r"data\.num_workers"),
        ({"seed": -1}, r"data\.seed must be at least 0"),
        ({"seed": 2**32}, r"data\.seed must be at most"),
        ({"eval_fraction": 1.0}, r"data\.eval_fraction"),
        ({"eval_fraction": 0.1, "eval_sources": [SourceConfig("a")]}, "give one of them"),
    ],
)
def test_wrong_settings_name_their_key(change, reason):
    with pytest.raises(PshareError, match=reason):
        check_data(DataConfig(**{"sources": [SourceConfig("a")], **change}))
