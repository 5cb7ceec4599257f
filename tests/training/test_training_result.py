"""The result of a run: module folders that this package, transformers and PEFT load, their card, and pshare-export."""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import hf_logits, load_hf, load_peft
from safetensors.flax import load_file
from tiny import VOCAB, assert_close, random_tokens
from tiny_runs import FULL, make_base_and_data, run_config

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.model.layer_stack import unstack_layers
from pshare_jax.settings import load_settings
from pshare_jax.share.decode_module import read_manifest
from pshare_jax.training.checkpoint import Checkpoints
from pshare_jax.training.cli import export_main
from pshare_jax.training.config import CheckpointConfig, EvaluationConfig, TrainConfig
from pshare_jax.training.model_card import add_accuracy
from pshare_jax.training.progress import Reporter
from pshare_jax.training.result import export
from pshare_jax.training.run import train

TOKENS = random_tokens(5, 2, 19)


@pytest.fixture(scope="module")
def base_and_data(tmp_path_factory):
    return make_base_and_data(tmp_path_factory.mktemp("base_and_data"), num_layers=1)


@pytest.fixture(scope="module")
def lora(base_and_data, tmp_path_factory):
    """A LoRA run of four steps, each with a checkpoint and held-out loss. Never written to."""
    config = run_config(
        base_and_data,
        tmp_path_factory.mktemp("lora") / "run",
        steps=4,
        checkpoint=CheckpointConfig(every=1, keep=4),
        evaluation=EvaluationConfig(every=1),
    )
    return config, train(config, evaluate_module=lambda module, trainable: {"eval_parts": float(len(trainable))})[1]


@pytest.fixture(scope="module")
def full_ft(base_and_data, tmp_path_factory):
    """A run of all weights. Between steps only master weights and two moments are in memory."""
    config = run_config(
        base_and_data, tmp_path_factory.mktemp("full") / "run", method="full_ft", module=FULL, steps=2, accumulation=1
    )
    with pytest.MonkeyPatch.context() as patch:
        found = counted_copies(patch, Reporter, "step")
        outcome = train(config)[1]
    assert found == [3, 3]
    return config, outcome


def counted_copies(patch, owner, name) -> list[int]:
    """A list that receives, at each call of a method, the number of arrays of the embedding's shape beyond those of now."""
    method, found = getattr(owner, name), []

    def copies():
        gc.collect()
        return sum(x.shape == (VOCAB, 64) for x in jax.live_arrays())

    def counted(*args, **kwargs):
        found.append(copies() - before)
        return method(*args, **kwargs)

    before = copies()
    patch.setattr(owner, name, counted)
    return found


def logits_of(module: ps.DecodeModule) -> np.ndarray:
    return np.asarray(module.steps.forward(module.params, TOKENS.astype(np.int32)))


def by_layer(outcome, base) -> dict[str, Any]:
    """The trained arrays of each layer."""
    return unstack_layers(outcome.state.trainable, base.config, base.mesh)


def module_of(config, outcome, base) -> ps.DecodeModule:
    """The run's final state as a module."""
    trained = by_layer(outcome, base)
    if config.module is FULL:
        return ps.DecodeModule(base.architecture, trained, base.mesh)
    shape = ps.load_module(Path(config.output) / "module", base).architecture
    return ps.DecodeModule(shape, {**base.params, **trained}, base.mesh)


def test_peft_loads_lora(lora, base_and_data):
    config, outcome = lora
    base, folder = ps.load(base_and_data[0]), Path(config.output) / "module"
    module = ps.load_module(folder, base)
    for path, array in by_layer(outcome, base).items():
        np.testing.assert_array_equal(np.asarray(module.params[path]), np.asarray(array), err_msg=path)
    expected = logits_of(module_of(config, outcome, base))
    assert np.abs(expected - np.asarray(base.logits(TOKENS))).max() > 1e-2, "training changed nothing"
    assert_close(hf_logits(load_peft(base_and_data[0], folder), TOKENS), expected)


def test_transformers_loads_a_merged_module(lora, base_and_data, tmp_path, capsys):
    config, outcome = lora
    base = ps.load(base_and_data[0])
    assert export_main(["--run", config.output, "--merge", "--output", str(tmp_path / "merged")]) == 0
    assert str(tmp_path / "merged") in capsys.readouterr().out
    expected = logits_of(module_of(config, outcome, base))
    assert_close(hf_logits(load_hf(tmp_path / "merged"), TOKENS), expected)
    # Still a decode module of the same base.
    module = ps.load_module(tmp_path / "merged", base)
    assert_close(logits_of(module), expected)
    card = read_manifest(tmp_path / "merged")
    assert (card.kind, card.prefill, card.base_fingerprint) == ("full", "base", base.fingerprint)
    assert card.training["module"]["merged"]
    assert "merged" in (tmp_path / "merged" / "README.md").read_text()


def test_full_ft_is_an_ordinary_checkpoint(full_ft, base_and_data):
    config, outcome = full_ft
    base, folder = ps.load(base_and_data[0]), Path(config.output) / "module"
    expected = logits_of(module_of(config, outcome, base))
    assert_close(hf_logits(load_hf(folder), TOKENS), expected)
    assert read_manifest(folder).prefill == "own"
    assert "ordinary fine-tune" in card_lines(folder)[0]
    with pytest.raises(PshareError, match="prefill 'own'"):
        ps.load_module(folder, base)
    with pytest.raises(PshareError, match="--merge"):
        export(Path(config.output), merge=True)


def test_resume_and_export_hold_only_the_restored_arrays(full_ft, tmp_path, monkeypatch):
    config, outcome = full_ft
    shutil.copytree(config.output, tmp_path / "run")
    resumed = counted_copies(monkeypatch, Checkpoints, "restore")
    exported = counted_copies(monkeypatch, Checkpoints, "restore_trainable")
    again = train(replace(config, output=str(tmp_path / "run")), resume=True)[1]
    # The base is in memory until training begins.
    assert resumed == [1]
    for path, array in outcome.state.trainable.items():
        np.testing.assert_array_equal(np.asarray(again.state.trainable[path]), np.asarray(array))
    del again
    export(tmp_path / "run", merge=False)
    assert exported == [0]


def card_lines(folder: Path) -> list[str]:
    """The card's lines behind its metadata."""
    return (folder / "README.md").read_text().split("---\n")[2].strip().splitlines()


def test_the_card_begins_with_the_purpose(lora, tmp_path):
    config, outcome = lora
    folder = shutil.copytree(Path(config.output) / "module", tmp_path / "module")
    first, *rest = card_lines(folder)
    assert config.base in first
    assert "run alone" in first
    assert "not measured" in first
    assert f"| eval_loss | {outcome.evaluation['eval_loss']:.4g} |" in rest
    assert "| eval_parts | 6 |" in rest
    add_accuracy(folder, "sums.jsonl", 0.75, "module")
    add_accuracy(folder, "sums.jsonl", 0.5, "alone")
    add_accuracy(folder, "sums.jsonl", 0.25, "base")
    add_accuracy(folder, "sums.jsonl", 0.125, "alone")
    add_accuracy(folder, "more.jsonl", 0.0, "alone")
    first, *rest = card_lines(folder)
    assert "sums.jsonl 0.125, more.jsonl 0." in first
    assert "| accuracy, `sums.jsonl` | 0.75 |" in rest
    assert "| accuracy of the base, `sums.jsonl` | 0.25 |" in rest
    assert f"| eval_loss | {outcome.evaluation['eval_loss']:.4g} |" in rest
    ps.load_module(folder, ps.load(config.base))


def test_decode_module_json_describes_the_training(lora):
    config, outcome = lora
    training = json.loads((Path(config.output) / "module" / "decode_module.json").read_text())["training"]
    assert training == {
        "base": config.base,
        "method": "prefillshare",
        "module": {
            "kind": "lora",
            "init": None,
            "rank": 3,
            "alpha": 6.0,
            "targets": ["q", "v", "down"],
            "dropout": 0.0,
            "merged": False,
        },
        "objective": {"name": "sft"},
        "data": [config.data.sources[0].path],
        "clock": load_settings(TrainConfig, Path(config.output) / "config.yaml").data.clock,
        "steps": 4,
        "applied_steps": 4,
        "trained_tokens": outcome.tokens,
        "learning_rate": 3e-3,
        "seed": 0,
        "evaluation": dict(outcome.evaluation),
    }


def test_any_checkpoint_can_be_exported(lora, base_and_data, tmp_path):
    config, outcome = lora
    run, base = Path(config.output), ps.load(base_and_data[0])
    last = export(run, output=tmp_path / "last", merge=False)
    same = (last / "adapter_model.safetensors").read_bytes()
    assert same == (run / "module" / "adapter_model.safetensors").read_bytes()
    with Checkpoints(run / "checkpoints") as checkpoints:
        best = checkpoints.best
    assert best is not None
    for folder, step in (
        (export(run, step=2, output=tmp_path / "2", merge=False), 2),
        (export(run, step="best", output=tmp_path / "best", merge=False), best),
    ):
        assert read_manifest(folder).training["steps"] == step
    small = export(run, output=tmp_path / "small", merge=False, dtype="bfloat16")
    assert {x.dtype for x in load_file(small / "adapter_model.safetensors").values()} == {jnp.dtype("bfloat16")}
    module = ps.load_module(tmp_path / "2", base)
    path = "layers.0.attention.q.lora_b"
    assert np.abs(np.asarray(module.params[path]) - np.asarray(by_layer(outcome, base)[path])).max() > 1e-4


def test_impossible_exports(lora, tmp_path, base_and_data):
    config, _ = lora
    run = Path(config.output)
    with pytest.raises(PshareError, match=r"step 9.* 1, 2, 3, 4"):
        export(run, step=9, merge=False)
    assert export_main(["--run", str(tmp_path / "none")]) == 2
    (tmp_path / "young").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "young")
    with pytest.raises(PshareError, match="no complete checkpoint"):
        export(tmp_path / "young", merge=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(PshareError, match="not a decode module"):
        export(run, output=tmp_path / "mine", merge=False)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    copy = shutil.copytree(run, tmp_path / "run")
    (other := tmp_path / "other").mkdir()
    make_other = replace(config, base=str(other / "base"))
    shutil.copytree(base_and_data[0], other / "base", ignore=shutil.ignore_patterns(".pshare*"))
    weights = next((other / "base").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    text = (copy / "config.yaml").read_text().replace(config.base, make_other.base)
    (copy / "config.yaml").write_text(text)
    with pytest.raises(PshareError, match=r"other weights"):
        export(copy, merge=False)
    with pytest.raises(PshareError, match=r"other weights"):
        train(replace(make_other, output=str(copy)), resume=True)


def test_an_older_result_is_replaced_as_a_whole(lora, tmp_path):
    config, _ = lora
    folder = shutil.copytree(Path(config.output) / "module", tmp_path / "module")
    (folder / "stale.txt").write_text("old")
    export(Path(config.output), output=folder, merge=True)
    assert not (folder / "stale.txt").exists()
    assert not (folder / "adapter_model.safetensors").exists()
    assert not (tmp_path / "module.part").exists()
