"""The device programs: sums over micro-batches and devices, values that are not finite, optimizer size, frozen base."""

import hashlib
import json
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILIES, tiny_folder
from tiny_runs import FULL, LORA, all_metrics, make_base_and_data, metrics, moments, run_config

import pshare_jax as ps
import pshare_jax.training.step.steps as steps_module
from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Architecture, is_lora
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.layers import LoraConfig
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.training.checkpoint import Checkpoints
from pshare_jax.training.config import TARGETS, CheckpointConfig, EvaluationConfig, MeshConfig, OptimizerConfig
from pshare_jax.training.data.batches import two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.run import train
from pshare_jax.training.step.mesh import shard_batch, training_mesh
from pshare_jax.training.step.objective import init_trainable, trainable_module
from pshare_jax.training.step.optimizer import update_rule
from pshare_jax.training.step.steps import train_steps

ADAMW = OptimizerConfig(learning_rate=0.01, schedule="constant", warmup_steps=0, eps=1e-3, clip_norm=0.5)
NAN_TARGET = 300


@pytest.fixture(scope="module")
def base_and_data(tmp_path_factory):
    return make_base_and_data(tmp_path_factory.mktemp("base_and_data"), num_layers=1)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A base with a vocabulary of 97, which no mesh divides."""
    return (tiny_folder("llama", tmp_path_factory.mktemp("odd"), num_hidden_layers=1, vocab_size=97),)


def hashes(params) -> dict[str, str]:
    return {path: hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for path, x in params.items()}


def drawn_samples(*answers: int) -> list[Sample]:
    """A sample for each number of answer tokens."""
    rng = np.random.default_rng(1)
    return [
        Sample(tuple(rng.integers(1, 97, 7 + n).tolist()), ((7, 7 + n),), "drawn", line)
        for line, n in enumerate(answers, start=1)
    ]


class Rig:
    """A module on a mesh and its compiled steps."""

    def __init__(self, base_and_data, config, mesh=None, optimizer=ADAMW):
        base = ps.load(base_and_data[0], mesh=training_mesh(mesh or MeshConfig()))
        module = trainable_module(base, "prefillshare", config, "float32")
        self.steps = train_steps(module.objective, update_rule(optimizer, 9), 0)
        self.fixed, self.mesh, self.base = (module.frozen, module.base_params), base.mesh, base
        self.state = self.steps.init(init_trainable(module, 0))

    def step(self, *batches, single_batch=False):
        sums = None if single_batch else self.steps.no_sums()
        for number, batch in enumerate(batches):
            arrays = shard_batch(batch, self.mesh)
            sums = self.steps.accumulate(sums, self.state.trainable, *self.fixed, arrays, np.int32(number))
        assert sums is not None
        self.state, result = self.steps.apply(self.state, sums)
        return result


def assert_equal_steps(rig, result, other, expected, tolerance=1e-6):
    assert float(result.loss) == pytest.approx(float(expected.loss), rel=tolerance)
    assert float(result.grad_norm) == pytest.approx(float(expected.grad_norm), rel=tolerance)
    assert (float(result.tokens), float(result.correct)) == (float(expected.tokens), float(expected.correct))
    for path, array in other.state.trainable.items():
        np.testing.assert_allclose(
            np.asarray(rig.state.trainable[path]), np.asarray(array), atol=tolerance, err_msg=path
        )


@pytest.fixture(scope="module")
def one_big(odd):
    rig = Rig(odd, FULL)
    # With answers of 1 and 31 tokens, a mean of means would be far off.
    return rig, rig.step(two_stream([[sample] for sample in drawn_samples(1, 31)], 8, 32), single_batch=True)


def test_two_micro_batches_equal_one_batch(odd, one_big):
    small = Rig(odd, FULL)
    result = small.step(*(two_stream([[sample]], 8, 32) for sample in drawn_samples(1, 31)))
    assert float(result.tokens) == 32
    assert_equal_steps(small, result, *one_big)
    # The sums start again at 0.
    again = small.step(two_stream([[drawn_samples(1, 31)[0]]], 8, 32))
    assert float(again.tokens) == 1


@pytest.mark.parametrize("mesh", [MeshConfig(data=2), MeshConfig(fsdp=2, tensor=2)], ids=["data", "fsdp-tensor"])
def test_devices_share_a_batch(odd, one_big, mesh):
    rig = Rig(odd, FULL, mesh)
    result = rig.step(two_stream([[sample] for sample in drawn_samples(1, 31)], 8, 32))
    assert_equal_steps(rig, result, *one_big, tolerance=1e-5)
    (stack,) = (path for path in rig.state.trainable if path.endswith("mlp.down.kernel"))
    for array in (rig.state.trainable[stack], moments(rig.state).nu[stack], rig.fixed[1][stack]):
        assert array.addressable_shards[0].data.size * mesh.fsdp * mesh.tensor == array.size


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_sharded_over_fsdp_and_tensor(tiny_folders, family):
    config = ModelConfig.from_hf(json.loads((tiny_folders[family] / "config.json").read_text()))
    architecture = Architecture(config).with_lora(LoraConfig(3, 1.0, TARGETS))
    mesh = training_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for path, leaf in architecture.shapes.items():
        shard = parameter_sharding(path, config, mesh).shard_shape(leaf.shape)
        parts = np.prod(leaf.shape) // np.prod(shard)
        # Norms are replicated, and one side of LoRA's matrices is only as long as the rank.
        wanted = 4 if len(leaf.shape) == 2 and not is_lora(path) else 2 if is_lora(path) else 1
        assert parts == wanted, path


@pytest.mark.parametrize("module", [FULL, LORA], ids=["full", "lora"])
def test_the_base_is_unchanged_and_the_optimizer_has_only_trainable_parameters(base_and_data, module):
    rig = Rig(base_and_data, module, optimizer=replace(ADAMW, weight_decay=0.1))
    before = hashes(rig.fixed[1])
    start = hashes(rig.state.trainable)
    batch = two_stream([[sample] for sample in drawn_samples(5, 9)], 8, 32)
    for _ in range(3):
        rig.step(batch)
    assert hashes(rig.fixed[1]) == before
    changed = {path for path, digest in hashes(rig.state.trainable).items() if digest != start[path]}
    assert changed == set(start)
    held = sum(x.nbytes for x in rig.state.trainable.values())
    if module is FULL:
        assert held == sum(x.nbytes for x in rig.base.params.values())
    arrays = jax.tree.leaves(rig.state.optimizer)
    # Two moments per parameter, and a few counters of 4 bytes.
    assert sum(x.nbytes for x in arrays if x.ndim) == 2 * held
    assert sum(x.nbytes for x in arrays if not x.ndim) <= 16
    assert all(x.dtype == jnp.float32 for x in rig.state.trainable.values())


# --- not finite ------------------------------------------------------------------------------------------------------


def poisoned(kind: str):
    """A loss that is not finite if the batch contains the target NAN_TARGET."""
    loss = steps_module.batch_loss

    def spoiled(objective, trainable, frozen, base_params, batch, key):
        value, tallies = loss(objective, trainable, frozen, base_params, batch, key)
        bad = (batch.targets == NAN_TARGET).any()
        if kind == "gradient":
            # Its value is 0, its gradient infinite.
            weight = next(iter(trainable.values())).ravel()[0]
            zero = weight - jax.lax.stop_gradient(weight)
            return value + jnp.sqrt(jnp.where(bad, zero, 1.0)) - jnp.where(bad, 0.0, 1.0), tallies
        return value * jnp.where(bad, {"nan": jnp.nan, "inf": jnp.inf}[kind], 1.0), tallies

    return spoiled


def poison(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, ids=(*sample.ids[:-1], NAN_TARGET)) for sample in samples]


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_changes_only_the_counters(base_and_data, monkeypatch, kind):
    monkeypatch.setattr(steps_module, "batch_loss", poisoned(kind))
    rig = Rig(base_and_data, LORA)
    good = two_stream([drawn_samples(3)], 8, 32)
    bad = two_stream([poison(drawn_samples(4))], 8, 32)
    assert rig.step(good).applied
    before = jax.device_get((rig.state.trainable, rig.state.optimizer))
    # One bad micro-batch makes the step bad.
    first, second = rig.step(good, bad), rig.step(bad)
    for old, new in zip(
        jax.tree.leaves(before), jax.tree.leaves((rig.state.trainable, rig.state.optimizer)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(new), old)
    assert not first.applied
    assert (int(second.bad), int(second.all_bad), int(rig.state.applied)) == (2, 2, 1)
    last = rig.step(good)
    assert last.applied
    assert (int(last.bad), int(last.all_bad), int(rig.state.applied)) == (0, 2, 2)
    assert float(last.tokens) == 3


def test_an_update_that_overflows_ends_the_run_before_it_is_saved(base_and_data, tmp_path):
    overflowing = replace(ADAMW, learning_rate=3e38, weight_decay=1e10)
    rig = Rig(base_and_data, LORA, optimizer=overflowing)
    result = rig.step(two_stream([drawn_samples(3)], 8, 32))
    assert np.isfinite([float(result.loss), float(result.grad_norm)]).all()
    assert not result.finite
    run = tmp_path / "run"
    config = run_config(base_and_data, run, optimizer=overflowing, checkpoint=CheckpointConfig(every=1))
    with pytest.raises(PshareError, match=r"step 1, whose update .*learning_rate"):
        train(config)
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert not checkpoints.steps


@pytest.mark.parametrize("module", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_an_update_needs_no_copy_of_the_state(base_and_data, module, name):
    """Beside what it is given, at most 1.1 times the largest array with AdamW; no optimizer needs a copy of all arrays."""
    rig = Rig(base_and_data, module, optimizer=replace(ADAMW, name=name))
    sums = jax.eval_shape(rig.steps.no_sums)
    program = cast(Any, rig.steps.apply).lower(rig.steps.state, sums).compile()
    sizes = [x.size * 4 for x in rig.state.trainable.values()]
    # 4 KiB: scalars and alignment, which matter for an adapter this small.
    most = 1.1 * max(sizes) if name == "adamw" else 1.1 * sum(sizes)
    assert program.memory_analysis().temp_size_in_bytes <= most + 4096


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one", "eight"])
def test_every_optimizer_learns_and_keeps_what_it_says(base_and_data, name, mesh):
    rig = Rig(base_and_data, FULL, mesh, replace(ADAMW, name=name, learning_rate=1e-3, moment_dtype="bfloat16"))
    batch = two_stream([[sample] for sample in drawn_samples(9, 9, 9, 9)], 8, 32)
    losses = [float(rig.step(batch).loss) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    weights = sum(x.size for x in rig.state.trainable.values())
    held = sum(x.nbytes for x in jax.tree.leaves(rig.state.optimizer)) / weights
    # One moment in bfloat16 and one in float32; one in bfloat16; rows and columns, of matrices at least 128 wide.
    assert {"adamw": 6, "lion": 2, "adafactor": 4}[name] == pytest.approx(held, rel=0.05)


def test_a_run_counts_bad_steps_and_ends_after_too_many(base_and_data, tmp_path, monkeypatch):
    loss = steps_module.batch_loss

    def ever_more(objective, trainable, frozen, base_params, batch, key):
        """NaN once B is not 0, so after the first applied step."""
        value, tallies = loss(objective, trainable, frozen, base_params, batch, key)
        moved = jnp.abs(trainable["layers.0:1:1.attention.q.lora_b"]).sum() > 0
        return value * jnp.where(moved, jnp.nan, 1.0), tallies

    monkeypatch.setattr(steps_module, "batch_loss", ever_more)
    config = run_config(
        base_and_data,
        tmp_path / "run",
        accumulation=1,
        max_bad_steps=3,
        checkpoint=CheckpointConfig(every=1, keep=9),
        evaluation=EvaluationConfig(),
    )
    with pytest.raises(PshareError, match=r"step 4.*3 .*max_bad_steps"):
        train(config)
    lines = metrics(tmp_path / "run")
    assert [line["applied"] for line in lines] == [True, False, False, False]
    assert [line["bad_steps"] for line in lines] == [0, 1, 2, 3]
    assert [line["loss"] is None for line in lines] == [False, True, True, True]
    # A bad step does not advance the schedule.
    assert lines[1]["learning_rate"] == lines[3]["learning_rate"] > lines[0]["learning_rate"]
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    rig = Rig(base_and_data, LORA)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps
        for step in checkpoints.steps:
            restored = checkpoints.restore(step, rig.state)
            assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(restored))
            assert int(restored.applied) == 1
    assert not (tmp_path / "run" / "module").exists()
    assert len(all_metrics(tmp_path / "run")) == 4
