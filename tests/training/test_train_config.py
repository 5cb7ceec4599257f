"""The train config, its checks, and the commands that load it."""

from pathlib import Path

import pytest

from pshare_jax.settings import load_settings, to_yaml
from pshare_jax.training.cli import main
from pshare_jax.training.config import TrainConfig, changed_keys, check_train_config

pytestmark = pytest.mark.host

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


def test_yaml_round_trip(path, tmp_path):
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
    "override",
    [
        "base=' '",
        "output=''",
        "method=naive",
        "module.kind=dora",
        "module.rank=0",
        "module.alpha=0",
        "module.dropout=1",
        "module.targets=[]",
        "module.targets=[q, w]",
        "module.targets=[q, q]",
        "module.targets=[lm_head]",
        "module={kind: full, dropout: 0.1}",
        "optimizer.learning_rate=0",
        "optimizer.b2=1",
        "optimizer.warmup_ratio=-0.1",
        "optimizer.warmup_steps=-1",
        "optimizer.weight_decay=-1",
        "optimizer.clip_norm=0",
        "optimizer.schedule=step",
        "optimizer.lr=1",
        "steps=0",
        "data.epochs=null",
        "accumulation=0",
        "dtype=float16",
        "mesh.tensor=0",
        "mesh.data=3",
        "checkpoint.every=0",
        "checkpoint.keep=0",
        "evaluation.every=5",
        "max_bad_steps=0",
        "seed=-1",
        "data.max_len=1",
    ],
)
def test_every_wrong_value_is_reported_by_its_key_before_anything_is_loaded(path, capsys, override):
    # The base does not exist, so a later check would report that instead.
    assert main(["--config", str(path), override]) == 2
    error = capsys.readouterr().err
    assert override.partition("=")[0] in error
    assert "nowhere" not in error
    assert error.startswith("pshare-train: ")
    assert error.count("\n") == 1


def test_print_config(path, capsys, tmp_path):
    assert main(["--config", str(path), "--print-config", "optimizer.learning_rate=1e-5"]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert loaded(resolved) == loaded(path, "optimizer.learning_rate=1e-5")


def test_the_committed_configs_are_valid():
    for config in (Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"):
        loaded(config)


def test_resume_needs_a_run(path, tmp_path, capsys):
    assert main(["--config", str(path), f"output={tmp_path / 'out'}", "--resume"]) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_the_keys_that_a_resumed_run_may_change(path):
    config = loaded(path)
    other = loaded(path, "mesh.data=2", "checkpoint.every=7", "data.num_workers=2", "steps=9", "output=elsewhere")
    assert changed_keys(config, other) == []
    other = loaded(path, "module.rank=4", "optimizer.b1=0.8", "data.sources=[{path: y}]", "seed=3")
    assert changed_keys(config, other) == ["data.sources", "module.rank", "optimizer.b1", "seed"]
