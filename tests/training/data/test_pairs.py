"""Pairs of answers from records of shape preference: one prompt, two answers, each as supervised training would have it."""

from typing import Any

import pytest
from training_data import NO_LIMITS, chat, sample_set, tokenizers, write_jsonl

from pshare_jax.training.data.batches import one_stream, two_stream
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig
from pshare_jax.training.data.epochs import sample_lengths
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.data.records import Dropped, RecordReader
from pshare_jax.training.data.samples import Limits
from pshare_jax.training.data.shapes import shaped

pytestmark = pytest.mark.host

RECORD = {"prompt": "one?", "chosen": "a good answer", "rejected": "bad"}
TALK = {"chosen": chat("hi", "ho", "one?", "good"), "rejected": chat("hi", "ho", "one?", "bad")}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    return tokenizers(tmp_path_factory.mktemp("tokenizers"))["llama"]


def reader(tok, *, pairs: bool, chat: bool = True, limits: Limits = NO_LIMITS) -> RecordReader:
    return RecordReader(tok, frozenset(tok.eos_ids), chat, limits, pairs=pairs)


@pytest.mark.parametrize(
    ("record", "as_chat"), [(RECORD, True), (TALK, True), (RECORD, False)], ids=["texts", "talk", "text"]
)
def test_each_answer_is_that_of_supervised_training(tok, record, as_chat):
    pair = shaped(record, "preference", {})
    (sample,), _ = reader(tok, pairs=True, chat=as_chat).samples(pair, "file", 7)
    other = {**pair, "completion": pair["rejected"]}
    singles = [reader(tok, pairs=False, chat=as_chat).samples(each, "file", 7)[0][0] for each in (pair, other)]
    assert sample.whole == singles
    assert sample.rejected
    assert (sample.line, sample.context_len) == (7, singles[0].context_len)


@pytest.mark.parametrize(
    "record",
    [
        {**RECORD, "rejected": RECORD["chosen"]},
        {**RECORD, "rejected": None},
        {**TALK, "rejected": chat("other", "ho", "one?", "bad")},
        {**TALK, "rejected": "bad"},
    ],
    ids=["equal", "one", "prompts", "forms"],
)
def test_what_is_no_pair_is_dropped(tok, record):
    with pytest.raises(Dropped, match="no pair"):
        reader(tok, pairs=True).samples(shaped(record, "preference", {}), "file", 1)


@pytest.mark.parametrize("layout", ["two_stream", "one_stream"])
def test_a_pair_fits_its_row_or_is_left_out(tok, tmp_path, layout: Any):
    """With the least lengths that hold the longest pair, all pairs are in; with one token less, it is left out."""
    records = [{"prompt": "p" * n, "chosen": "yes" * n, "rejected": "no"} for n in (1, 2, 9)]
    source = SourceConfig(write_jsonl(tmp_path / "pairs.jsonl", records), shape="preference")

    def prepared(**lengths):
        config = DataConfig([source], batch=RowsConfig(1, **lengths))
        return prepare(config, tok, frozenset(tok.eos_ids), layout, pairs=True)

    found = prepared().train.store
    needs = sample_lengths(sample_set(list(found)), layout).max(axis=0).tolist()
    enough = prepared(context_len=needs[0], answer_len=needs[1])
    assert len(enough.train) == 3
    make = two_stream if layout == "two_stream" else one_stream
    assert make([[found[2]]], *needs).weights.sum() == found[2].answer_len
    for less in ((needs[0] - 1, needs[1]), (needs[0], needs[1] - 1)):
        report = prepared(context_len=less[0], answer_len=less[1]).report
        assert report.train_samples == 2
        assert "too long" in str(report)
