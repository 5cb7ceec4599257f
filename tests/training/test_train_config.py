"""What a train config may say, the command line around it, and the optimizer that it describes."""

from dataclasses import replace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pshare_jax.errors import PshareError
from pshare_jax.settings import load_settings, to_yaml
from pshare_jax.training.cli import export_main, main
from pshare_jax.training.config import OptimizerConfig, TrainConfig, changed_keys, check_train_config
from pshare_jax.training.step.optimizer import decayed, make_optimizer, make_schedule

MINIMAL = "base: nowhere\noutput: out\ndata: {sources: [{path: x.jsonl}]}\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(MINIMAL)
    return path


def loaded(path, *overrides) -> TrainConfig:
    config = load_settings(TrainConfig, path, overrides)
    check_train_config(config)
    return config


def test_a_config_comes_back_from_its_yaml(path, tmp_path):
    config = loaded(
        path, "module.targets=[q, v]", "data.epochs=null", "steps=7", "optimizer.clip_norm=null", "mesh.fsdp=4"
    )
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert loaded(again) == config
    assert config.module.targets == ("q", "v")
    assert (config.mesh.size, config.layout) == (4, "two_stream")
    assert loaded(path, "method=full_ft", "module.kind=full").layout == "one_stream"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("base=' '", "base is empty"),
        ("output=''", "output is empty"),
        ("method=naive", "method must be 'prefillshare' or 'full_ft'"),
        ("module.kind=dora", "module.kind"),
        ("module.rank=0", "module.rank must be at least 1"),
        ("module.alpha=0", "module.alpha must be more than 0"),
        ("module.dropout=1", "module.dropout must be at least 0 and less than 1"),
        ("module.targets=[]", "module.targets is empty"),
        ("module.targets=[q, w]", "module.targets has 'w'; known are q, k, v, o, gate, up, down"),
        ("module.targets=[q, q]", "names a projection twice"),
        ("module.targets=[lm_head]", "embeddings and head get no LoRA"),
        ("module={kind: full, dropout: 0.1}", "module.dropout is LoRA's"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate must be more than 0"),
        ("optimizer.b2=1", "optimizer.b2 must be at least 0 and less than 1"),
        ("optimizer.warmup_ratio=-0.1", "optimizer.warmup_ratio"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps must be at least 0"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay must be at least 0"),
        ("optimizer.clip_norm=0", "optimizer.clip_norm must be more than 0"),
        ("optimizer.schedule=step", "optimizer.schedule must be"),
        ("optimizer.lr=1", "Unknown key optimizer.lr"),
        ("steps=0", "steps must be at least 1"),
        ("data.epochs=null", "steps must say when"),
        ("accumulation=0", "accumulation must be at least 1"),
        ("dtype=float16", "dtype must be"),
        ("mesh.tensor=0", "mesh.tensor must be at least 1"),
        ("mesh.data=3", "data.batch.rows is 4, which mesh.data * mesh.fsdp = 3 devices cannot share"),
        ("checkpoint.every=0", "checkpoint.every must be at least 1"),
        ("checkpoint.keep=0", "checkpoint.keep must be at least 1"),
        ("evaluation.every=5", "evaluation.every is set, but there are no evaluation data"),
        ("max_bad_steps=0", "max_bad_steps must be at least 1"),
        ("seed=-1", "seed must be at least 0"),
        ("data.max_len=1", "data.max_len must be at least 3"),
    ],
)
def test_every_wrong_value_is_told_before_anything_is_loaded(path, capsys, override, said):
    # The base does not exist: a check that came later would say so instead.
    assert main(["--config", str(path), override]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("pshare-train: ")
    assert error.count("\n") == 1


def test_print_config(path, capsys, tmp_path):
    assert main(["--config", str(path), "--print-config", "optimizer.learning_rate=1e-5"]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert loaded(resolved) == loaded(path, "optimizer.learning_rate=1e-5")


def test_the_committed_config_is_valid():
    from tiny_runs import ROOT

    for config in (ROOT / "configs" / "train").glob("*.yaml"):
        loaded(config)


def test_a_run_that_is_not_there(path, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--config", str(path), f"output={out}", "--resume"]) == 2
    assert f"There is no run in {out} to resume" in capsys.readouterr().err
    assert export_main(["--run", str(out)]) == 2
    assert f"There is no run in {out}" in capsys.readouterr().err


def test_what_a_resumed_run_may_change(path):
    config = loaded(path)
    other = loaded(path, "mesh.data=2", "checkpoint.every=7", "data.num_workers=2", "steps=9", "output=elsewhere")
    assert changed_keys(config, other) == []
    other = loaded(path, "module.rank=4", "optimizer.b1=0.8", "data.sources=[{path: y}]", "seed=3")
    assert changed_keys(config, other) == ["data.sources", "module.rank", "optimizer.b1", "seed"]


# --- optimizer -------------------------------------------------------------------------------------------------------


def test_schedules():
    config = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.2)
    for schedule, at in (
        ("linear", [2 / 3, 4 / 3, 2, 2 * 7 / 8, 2 / 8]),
        ("cosine", [2 / 3, 4 / 3, 2, 1 + np.cos(np.pi / 8), 1 + np.cos(7 * np.pi / 8)]),
        ("constant", [2 / 3, 4 / 3, 2, 2, 2]),
    ):
        rate = cast(Any, make_schedule(replace(config, schedule=schedule), 10))
        np.testing.assert_allclose([float(rate(step)) for step in (0, 1, 2, 3, 9)], at, rtol=1e-5)
    assert make_schedule(replace(config, warmup_steps=0), 10)(0) == 2
    # A warm-up longer than the run never gets to the peak.
    rate = cast(Any, make_schedule(replace(config, warmup_steps=99), 2))
    assert float(rate(1)) == pytest.approx(2 * 2 / 3)


def test_one_step_is_adamw_by_hand():
    """Clipping first, then Adam's step, then decay of matrices only."""
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        clip_norm=1.0,
    )
    params = {"layers.0.attention.q.kernel": jnp.array([[2.0, -1.0]]), "final_norm.weight": jnp.array([3.0])}
    gradients = {"layers.0.attention.q.kernel": jnp.array([[3.0, 0.0]]), "final_norm.weight": jnp.array([4.0])}
    optimizer = make_optimizer(config, 5)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    after: Any = optax.apply_updates(params, updates)
    for path, decay in (("layers.0.attention.q.kernel", 0.5), ("final_norm.weight", 0.0)):
        clipped = np.asarray(gradients[path]) / 5.0
        step = clipped / (np.abs(clipped) + 1e-3) + decay * np.asarray(params[path])
        np.testing.assert_allclose(after[path], np.asarray(params[path]) - 0.1 * step, rtol=1e-5)


def test_what_decays():
    paths = ["layers.1.attention.q.bias", "layers.1.attention.q_norm.weight", "layers.1.pre_mlp_norm.weight"]
    paths += [
        "embedding.weight",
        "head",
        "layers.1.mlp.down.lora_a",
        "layers.1.mlp.down.lora_b",
        "layers.1.mlp.up.kernel",
    ]
    assert list(decayed(dict.fromkeys(paths, jnp.zeros(1))).values()) == [False] * 3 + [True] * 5


def test_checks_name_what_is_wrong_in_the_library_too(path):
    with pytest.raises(PshareError, match="accumulation must be at least 1"):
        check_train_config(replace(loaded(path), accumulation=0))
