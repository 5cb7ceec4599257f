"""Whole runs with each objective: an interrupted run equals an uninterrupted run, the result names its objective, and what a
run cannot use is refused in one sentence.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_module
from tiny_runs import FULL, LORA, all_metrics, assert_same_steps, make_base_and_data, metrics, run_config, stop_after
from training_data import write_jsonl

from pshare_jax.errors import PshareError
from pshare_jax.share.decode_module import read_manifest
from pshare_jax.training.cli import main
from pshare_jax.training.config import EvaluationConfig, TrainConfig
from pshare_jax.training.data.config import SourceConfig
from pshare_jax.training.objective_config import ObjectiveConfig, check_objective
from pshare_jax.training.run import train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, conversations, pairs of answers, and a fine-tune."""
    root = tmp_path_factory.mktemp("objectives")
    base, chats = make_base_and_data(root, num_layers=1, records=9)
    pairs = [{"prompt": f"{n} plus 1?", "chosen": str(n + 1), "rejected": f"no {n}"} for n in range(9)]
    tuned = tiny_module(base, root / "tuned")
    (tuned / "decode_module.json").unlink()
    return {"base": base, "chats": chats, "pairs": write_jsonl(root / "pairs.jsonl", pairs), "tuned": tuned}


def config_of(world, output: Path, name: str, **changes) -> TrainConfig:
    """Few steps of two batches, with held-out records."""
    dpo = name == "dpo"
    objective = ObjectiveConfig("dpo") if dpo else ObjectiveConfig("distillation", str(world["tuned"]), 2.0, 4, 0.5)
    config = run_config((world["base"], world["pairs" if dpo else "chats"]), output, objective=objective, **changes)
    sources = [SourceConfig(world["pairs"], shape="preference")] if dpo else config.data.sources
    return replace(config, data=replace(config.data, sources=sources, epochs=2))


@pytest.mark.parametrize(
    ("name", "method", "kind"),
    [("distillation", "prefillshare", LORA), ("dpo", "prefillshare", LORA), ("dpo", "full_ft", FULL)],
    ids=["distillation", "dpo", "dpo-full_ft"],
)
def test_a_resumed_run_equals_an_uninterrupted_run(world, tmp_path, monkeypatch, name, method, kind):
    config = config_of(world, tmp_path / "straight", name, method=method, module=kind)
    _, expected = train(config)
    lines = metrics(config.output)
    other = replace(config, output=str(tmp_path / "resumed"))
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert not train(other)[1].finished
    _, outcome = train(other, resume=True)
    assert outcome.finished
    assert_same_steps(metrics(other.output), lines)
    own = {"distillation": ("kl", "nll"), "dpo": ("preferred", "margin")}[name]
    for ours, theirs in zip(metrics(other.output), lines, strict=True):
        assert [ours[key] for key in own] == pytest.approx([theirs[key] for key in own], rel=1e-5, abs=1e-7)
    for x, y in zip(jax.tree.leaves(outcome.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    evaluated = [line for line in all_metrics(config.output) if "eval_loss" in line]
    assert evaluated
    assert {f"eval_{key}" for key in own} < set(evaluated[-1])
    if name == "dpo":
        assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
        assert lines[0]["margin"] == pytest.approx(0, abs=1e-4)
    module = Path(config.output) / "module"
    assert read_manifest(module).training["objective"] == config.objective.described()
    assert f"- Objective: {name}" in (module / "README.md").read_text()


def test_a_teacher_may_be_the_base(world, tmp_path):
    """A fresh adapter on the base's KV is the base on its own KV, so the first divergence is 0."""
    config = config_of(world, tmp_path / "run", "distillation")
    config = replace(
        config, objective=ObjectiveConfig("distillation", config.base), evaluation=EvaluationConfig(), steps=1
    )
    train(config)
    assert metrics(config.output)[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_what_does_not_fit_is_refused_with_the_key(world, tmp_path):
    shared = tiny_module(world["base"], tmp_path / "shared", kind="lora")
    other = tiny_module(world["base"], tmp_path / "other")
    (other / "decode_module.json").unlink()
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    for number, (teacher, words) in enumerate(
        [(shared, "trained on the base's KV"), (other, "another vocabulary"), (tmp_path / "none", "there is no folder")]
    ):
        config = config_of(world, tmp_path / f"run{number}", "distillation")
        with pytest.raises(PshareError, match=words):
            train(replace(config, objective=ObjectiveConfig("distillation", str(teacher))))


@pytest.mark.parametrize(
    ("objective", "key"),
    [
        (ObjectiveConfig("distillation"), "objective.teacher"),
        (ObjectiveConfig(teacher="x"), "objective.teacher belongs to distillation"),
        (ObjectiveConfig("dpo", top_k=3), "objective.top_k belongs to distillation"),
        (ObjectiveConfig("distillation", "x", beta=0.2), "objective.beta belongs to dpo"),
        (ObjectiveConfig("distillation", "x", temperature=0.0), "objective.temperature"),
        (ObjectiveConfig("distillation", "x", top_k=0), "objective.top_k"),
        (ObjectiveConfig("distillation", "x", alpha=1.5), "objective.alpha"),
        (ObjectiveConfig("dpo", beta=math.inf), "objective.beta"),
    ],
)
def test_wrong_objectives_are_refused(objective, key):
    with pytest.raises(PshareError, match=key):
        check_objective(objective)


def test_dpo_needs_pairs(world, tmp_path, capsys):
    command = ["--config", str(tmp_path / "config.yaml"), "--print-config"]
    (tmp_path / "config.yaml").write_text(
        f"base: b\noutput: o\nobjective: {{name: dpo}}\ndata: {{sources: [{{path: {world['pairs']}}}]}}\n"
    )
    assert main(command) == 2
    assert "shape: preference" in capsys.readouterr().err
