"""Preparation: the store, the split into training and evaluation data, and the checks of the data section."""

import pickle

import pytest
from training_data import chat, random_samples, sample_set, tokenizers, write_jsonl

from pshare_jax.errors import PshareError
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig, check_data
from pshare_jax.training.data.prepare import prepare

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizers(tmp_path_factory.mktemp("tokenizers"))["llama"]


def test_a_store_reads_the_same_in_another_process():
    samples = random_samples(3, 30)
    data = sample_set(samples)
    copy = pickle.loads(pickle.dumps(data.store))
    assert list(copy) == list(data.store) == samples
    assert copy[3:5] == samples[3:5]
    for index in (-1, 30):
        with pytest.raises(IndexError):
            copy[index]
    assert len(pickle.dumps(data.store)) < 1000


# --- the split -------------------------------------------------------------------------------------------------------


def test_the_split_keeps_records_and_equal_records_on_one_side(tok, tmp_path):
    records = [{"messages": chat(f"q{index % 60}", "a", f"r{index % 60}", f"b{index % 60}")} for index in range(80)]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    config = DataConfig([SourceConfig(path)], eval_fraction=0.1, batch=RowsConfig(answer_len=4))
    found = prepare(config, tok, tok.eos_ids)
    sides = [{found.train.store[int(i)].line for i in part.members[0]} for part in (found.train, found.evaluation)]
    assert sides[0] | sides[1] == set(range(1, 81))
    assert not sides[0] & sides[1]
    assert 8 <= len(sides[1]) <= 9
    assert not {(line - 1) % 60 for line in sides[0]} & {(line - 1) % 60 for line in sides[1]}
    # Each record gives two samples.
    assert len(found.train) == 2 * len(sides[0])
    again = prepare(config, tok, tok.eos_ids)
    assert [m.tolist() for m in again.evaluation.members] == [m.tolist() for m in found.evaluation.members]
    assert found.report.leaked == 0
    with pytest.raises(PshareError, match=r"data\.eval_fraction"):
        prepare(
            DataConfig([SourceConfig(write_jsonl(tmp_path / "b.jsonl", records[:1]))], eval_fraction=0.5),
            tok,
            tok.eos_ids,
        )


def test_what_is_asked_on_both_sides_is_counted(tok, tmp_path):
    """The last user message in other case, space and punctuation, whatever stands before it or is answered."""
    tools = [[{"type": "function", "function": {"name": name, "parameters": {}}}] for name in ("a_b", "A.B", "c")]
    train = [{"messages": chat("Who, me?", "a", "r", "b"), "tools": tools[0]}, {"messages": chat("s", "c")}]
    held = [
        chat("who me", "other"),
        chat("q", "a", "S", "c", system="x"),
        chat("who", "a"),
        chat("r ", "x", "new", "b"),
    ]
    records = [{"messages": messages} for messages in held] + [
        {"messages": chat("p", "a"), "tools": tools[1]},
        {"prompt": "R!", "completion": "a"},
        {"messages": chat("t", "a"), "tools": tools[2]},
    ]
    config = DataConfig(
        [SourceConfig(write_jsonl(tmp_path / "a.jsonl", train))],
        eval_sources=[SourceConfig(write_jsonl(tmp_path / "b.jsonl", records))],
    )
    found = prepare(config, tok, tok.eos_ids)
    assert (len(found.train), len(found.evaluation)) == (2, 7)
    assert (found.report.leaked, found.report.shared_functions) == (3, 1)
    assert "last user message of 3 evaluation records" in str(found.report)
    assert "1 evaluation records list a function" in str(found.report)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sources": []}, r"data\.sources"),
        ({"sources": [SourceConfig("")]}, r"data\.sources\.0\.path"),
        ({"sources": [SourceConfig([])]}, r"data\.sources\.0\.path"),
        ({"sources": [SourceConfig("a", weight=0.0)]}, r"data\.sources\.0\.weight"),
        ({"eval_sources": [SourceConfig("a", weight=float("nan"))]}, r"data\.eval_sources\.0\.weight"),
        ({"max_len": 2}, r"data\.max_len.* 3"),
        ({"batch": RowsConfig(rows=0)}, r"data\.batch\.rows"),
        ({"batch": RowsConfig(context_len=0)}, r"data\.batch\.context_len"),
        ({"batch": RowsConfig(answer_len=-1)}, r"data\.batch\.answer_len"),
        ({"epochs": 0}, r"data\.epochs"),
        ({"num_workers": -1}, r"data\.num_workers"),
        ({"seed": -1}, r"data\.seed.* 0"),
        ({"seed": 2**32}, r"data\.seed.* 4294967295"),
        ({"eval_fraction": 1.0}, r"data\.eval_fraction"),
        ({"eval_fraction": 0.1, "eval_sources": [SourceConfig("a")]}, r"data\.eval_fraction and data\.eval_sources"),
    ],
)
def test_wrong_values_are_reported_by_their_key(change, reason):
    with pytest.raises(PshareError, match=reason):
        check_data(DataConfig(**{"sources": [SourceConfig("a")], **change}))
