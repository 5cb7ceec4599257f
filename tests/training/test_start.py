"""Training from what exists: the first loss is the score that serving gives to it, whatever it is."""

import json
from dataclasses import replace

import numpy as np
import pytest
from peft_adapters import random_adapter
from tiny import tiny_module
from tiny_runs import FULL, LORA, make_base_and_data, metrics, run_config

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.share.decode_module import load_module, read_manifest
from pshare_jax.share.generate import score
from pshare_jax.share.quantize import quantize
from pshare_jax.training.config import EvaluationConfig, MeshConfig, TrainConfig
from pshare_jax.training.data.prepare import prepare
from pshare_jax.training.result import export
from pshare_jax.training.run import train

WIDE = replace(LORA, rank=6, alpha=6.0, targets=("q", "v", "o", "down", "up"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, few records, and what a user may have made of that base."""
    root = tmp_path_factory.mktemp("start")
    base, data = make_base_and_data(root, num_layers=1, records=4)
    found = {
        "fine-tune": tiny_module(base, root / "fine-tune"),
        "module": tiny_module(base, root / "lora", kind="lora"),
    }
    (found["fine-tune"] / "decode_module.json").unlink()
    random_adapter(base, root / "peft")
    return (base, data), {**found, "adapter": root / "peft", "base": base}


def config_of(world, output, **module) -> TrainConfig:
    config = run_config(world[0], output, steps=1, accumulation=9, evaluation=EvaluationConfig(), **module)
    return replace(config, data=replace(config.data, epochs=1, eval_fraction=0.0))


def served_loss(world, config: TrainConfig, folder) -> float:
    """The mean of -log p over all target tokens, as generation computes it from the base's KV."""
    base = ps.load(config.base)
    module = load_module(folder, base, prefill="own")
    shared = ps.factorize(base)
    shared.add_task("task", module)
    data = prepare(config.data, base.tokenizer, base.stop_ids)
    found = []
    for sample in data.train.store:
        for start, end in sample.turns:
            found += score(shared, "task", sample.ids[:end], response_start=start)[start:]
    return -float(np.mean(found))


@pytest.mark.parametrize(
    ("source", "kind"),
    [("fine-tune", FULL), ("adapter", WIDE), ("adapter", FULL), ("module", WIDE), ("module", FULL), ("base", FULL)],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_the_first_loss_is_the_servers_score(world, tmp_path, source, kind):
    folder = world[1][source]
    config = config_of(world, tmp_path / "run", module=replace(kind, init=str(folder)))
    train(config)
    assert metrics(config.output)[0]["loss"] == pytest.approx(served_loss(world, config, folder), rel=2e-5)
    manifest = read_manifest(tmp_path / "run" / "module")
    assert manifest.training["module"]["init"] == str(folder)


def test_the_base_as_start_changes_nothing(world, tmp_path):
    for name, init in (("plain", None), ("base", str(world[1]["base"]))):
        train(config_of(world, tmp_path / name, module=replace(FULL, init=init)))
    ours, theirs = (metrics(tmp_path / name)[0] for name in ("plain", "base"))
    assert (ours["loss"], ours["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    files = [sorted((tmp_path / name / "module").glob("*.safetensors")) for name in ("plain", "base")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_what_does_not_fit_is_refused_with_the_key(world, tmp_path):
    found = world[1]
    settings = json.loads((found["adapter"] / "adapter_config.json").read_text())
    for number, (source, kind, words) in enumerate(
        [
            (found["fine-tune"], LORA, "module.kind: full"),
            (found["adapter"], LORA, rf"rank {settings['r']} .* set module.rank"),
            (found["adapter"], replace(WIDE, targets=("q", "v")), "module.targets to include"),
            (tmp_path / "none", FULL, "there is no folder"),
        ]
    ):
        config = config_of(world, tmp_path / f"run{number}", module=replace(kind, init=str(source)))
        with pytest.raises(PshareError, match=words):
            train(config)


# --- a quantised base ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(world, tmp_path_factory):
    """The base in int8 with the same records, and modules of it: an adapter, full weights, and these in int8."""
    root = tmp_path_factory.mktemp("quantized")
    base, data = world[0]
    quantize(base, root / "base")
    found = {kind: tiny_module(root / "base", root / kind, kind=kind) for kind in ("lora", "full")}
    quantize(root / "full", root / "small")
    return (root / "base", data), {**found, "base": root / "base", "small": root / "small", None: root / "base"}


@pytest.mark.parametrize(
    ("source", "kind", "mesh"),
    [
        ("lora", WIDE, MeshConfig()),
        ("lora", WIDE, MeshConfig(fsdp=2, tensor=2)),
        ("lora", FULL, MeshConfig()),
        ("full", FULL, MeshConfig()),
        ("small", FULL, MeshConfig()),
        ("base", FULL, MeshConfig()),
        (None, FULL, MeshConfig(fsdp=2, tensor=2)),
        (None, LORA, MeshConfig()),
    ],
    ids=lambda value: (
        f"{value.fsdp}x{value.tensor}" if isinstance(value, MeshConfig) else getattr(value, "kind", value)
    ),
)
def test_the_first_loss_on_a_quantised_base_is_the_servers_score(world, quantized, tmp_path, source, kind, mesh):
    folder = quantized[1][source]
    config = config_of(quantized, tmp_path / "run", module=replace(kind, init=source and str(folder)), mesh=mesh)
    train(config)
    assert metrics(config.output)[0]["loss"] == pytest.approx(served_loss(quantized, config, folder), rel=2e-5)
    # What it has learned is a module of the quantised base alone.
    saved = tmp_path / "run" / "module"
    module = load_module(saved, ps.load(config.base))
    assert module.architecture.weights == ("int8" if kind.kind == "lora" else None)
    with pytest.raises(PshareError, match="int8 weights, but this base's are unquantised"):
        load_module(saved, ps.load(world[0][0]))


def test_an_adapter_is_merged_into_dequantised_weights(quantized, tmp_path):
    config = config_of(quantized, tmp_path / "run", module=replace(WIDE, init=str(quantized[1]["lora"])))
    train(config)
    export(tmp_path / "run", merge=True)
    merged = tmp_path / "run" / "module-merged"
    assert load_module(merged, ps.load(config.base)).architecture.weights is None
    losses = [served_loss(quantized, config, folder) for folder in (merged, tmp_path / "run" / "module")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
