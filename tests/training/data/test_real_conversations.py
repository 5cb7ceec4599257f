"""Real multi-turn conversations: BFCL's multi-turn questions with the calls that answer each turn."""

import jax
import pytest
from tiny import tiny_folder
from training_data import write_jsonl

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.training.config import ModuleConfig
from pshare_jax.training.data.batches import TwoStreamBatch
from pshare_jax.training.data.bfcl import fetch_wheel, read_lines
from pshare_jax.training.data.config import DataConfig, RowsConfig, SourceConfig
from pshare_jax.training.data.loader import training_batches
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.step import streams
from pshare_jax.training.step.objective import batch_loss, trainable_module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ps.load(tiny_folder("llama", tmp_path_factory.mktemp("base") / "base", num_hidden_layers=1))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> str:
    """200 conversations of 1 to 7 turns."""
    try:
        wheel = fetch_wheel()
    except PshareError as error:
        pytest.skip(f"bfcl-eval: {error}")

    records = []
    answers = {
        line["id"]: line["ground_truth"] for line in read_lines(wheel, "possible_answer/BFCL_v4_multi_turn_base.json")
    }
    for question in read_lines(wheel, "BFCL_v4_multi_turn_base.json"):
        turns = zip(question["question"], answers[question["id"]], strict=True)
        talk = [[*asked, {"role": "assistant", "content": "\n".join(calls)}] for asked, calls in turns if calls]
        records.append({"messages": [message for turn in talk for message in turn]})
    return write_jsonl(tmp_path_factory.mktemp("data") / "turns.jsonl", records)


def test_rows_of_real_conversations_are_full_and_the_base_reads_each_once(base, conversations, monkeypatch):
    config = DataConfig([SourceConfig(conversations)], max_len=8192, batch=RowsConfig(rows=4))
    data = prepare(config, base.tokenizer, base.stop_ids)
    samples = [data.train.store[index] for index in range(len(data.train))]
    assert len(samples) == 200
    assert sum(len(sample.turns) for sample in samples) > 730
    with training_batches(data.train, config, "two_stream") as batches:
        assert batches.epochs.fill() >= 0.85
        read = [batch.arrays for batch in batches if isinstance(batch.arrays, TwoStreamBatch)]
    assert read
    # Whatever the turns, the base reads each token before the last answer's first input once.
    real = sum(int((batch.context_segments > 0).sum()) for batch in read)
    assert real == sum(sample.turns[-1][0] - 1 for sample in samples)
    assert real + sum(int(batch.weights.sum()) for batch in read) >= 0.85 * sum(
        batch.context_tokens.size + batch.targets.size for batch in read
    )
    passes = []
    base_kv = streams._base_kv

    def counted(objective, params, tokens, context):
        passes.append(tokens.shape)
        return base_kv(objective, params, tokens, context)

    monkeypatch.setattr(streams, "_base_kv", counted)
    module = trainable_module(base, "prefillshare", ModuleConfig(), "float32")
    jax.eval_shape(
        lambda params: batch_loss(module.objective, params, module.frozen, module.base_params, read[0], None),
        module.trainable_shapes,
    )
    assert passes == [read[0].context_tokens.shape]
