"""Checkpoints: which are kept, what they contain, and restoring on another mesh."""

import resource
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pshare_jax.errors import PshareError
from pshare_jax.mesh import replicated
from pshare_jax.training.checkpoint import Checkpoints, Progress
from pshare_jax.training.config import CheckpointConfig, MeshConfig, OptimizerConfig
from pshare_jax.training.step.mesh import training_mesh
from pshare_jax.training.step.optimizer import update_rule
from pshare_jax.training.step.steps import TrainState

DATA = {"epoch": 1, "batch": 2, "samples": "abc", "weights": [0.5]}


def state_on(mesh, spec, seed=0) -> TrainState:
    draw = np.random.default_rng(seed)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    params = {"head": jax.device_put(draw.normal(size=(16, 8)).astype(np.float32), sharding)}
    optimizer = update_rule(OptimizerConfig(), 10).transform
    moments = jax.tree.map(
        lambda x: jax.device_put(x, sharding if x.ndim else replicated(mesh)), optimizer.init(params)
    )
    counters = [jax.device_put(jnp.int32(count), replicated(mesh)) for count in (4, 1, 2)]
    return TrainState(params, moments, *counters)


def saved(folder: Path, losses: dict[int, float | None], config: CheckpointConfig) -> list[int]:
    state = state_on(training_mesh(MeshConfig()), ())
    with Checkpoints(folder, config) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(state, Progress(step, DATA, 9, "base", loss))
    return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize(
    ("losses", "config", "left"),
    [
        ({1: None, 2: None, 3: None, 4: None}, CheckpointConfig(keep=2), [3, 4]),
        ({1: None, 2: 1.0, 3: 2.0, 4: None}, CheckpointConfig(keep=1), [2, 4]),
        ({1: 3.0, 2: 2.0, 3: 1.0}, CheckpointConfig(keep=1), [3]),
        ({1: 1.0, 2: 2.0, 3: 3.0}, CheckpointConfig(keep=1, keep_best=False), [3]),
        ({1: 1.0, 2: 1.0, 3: 3.0}, CheckpointConfig(keep=1), [1, 3]),
    ],
)
def test_the_latest_and_the_best_are_kept(tmp_path, losses, config, left):
    assert saved(tmp_path / "checkpoints", losses, config) == left


def test_the_best_is_known_after_reopening(tmp_path):
    saved(tmp_path, {1: 2.0, 5: 1.5, 7: 1.7}, CheckpointConfig(keep=3))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1, 5, 7]
        assert (checkpoints.best, checkpoints.best_loss) == (5, 1.5)
    assert saved(tmp_path, {8: 3.0}, CheckpointConfig(keep=1)) == [5, 8]


def test_the_content_of_a_checkpoint(tmp_path):
    config = CheckpointConfig()
    with Checkpoints(tmp_path, config) as checkpoints:
        progress = Progress(3, DATA, 99, "base", 0.1)
        checkpoints.save(state_on(training_mesh(MeshConfig()), ()), progress)
        checkpoints.save(state_on(training_mesh(MeshConfig()), (), seed=1), progress)
        checkpoints.wait()
        assert checkpoints.progress(3) == progress
        assert checkpoints.applied(3) == 4
    names = {path.name for path in (tmp_path / "3").iterdir() if path.is_dir()}
    # The base is not saved.
    assert names == {"trainable", "optimizer", "progress"}


def test_restoring_on_any_mesh(tmp_path):
    first = training_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    state = state_on(first, ("fsdp", "model"))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, Progress(3, DATA, 9, "base"))
        checkpoints.wait()
        for mesh, spec in (
            (first, ("fsdp", "model")),
            (training_mesh(MeshConfig(data=8)), ()),
            (training_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ("model", "fsdp")),
            (training_mesh(MeshConfig()), ()),
        ):
            like = state_on(mesh, spec, seed=1)
            restored = checkpoints.restore(3, like)
            assert jax.tree.structure(restored) == jax.tree.structure(state)
            for new, old, wanted in zip(*map(jax.tree.leaves, (restored, state, like)), strict=True):
                np.testing.assert_array_equal(new, old)
                assert new.sharding == wanted.sharding
                assert new.dtype == old.dtype
            only = checkpoints.restore_trainable(3, like.trainable)
            np.testing.assert_array_equal(only["head"], state.trainable["head"])


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    mesh = training_mesh(MeshConfig())
    state = state_on(mesh, ())
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(state, Progress(3, DATA, 9, "base"))
        checkpoints.wait()
        with pytest.raises(PshareError, match=r"3: "):
            checkpoints.restore_trainable(3, {"other": state.trainable["head"]})


def save_without_room(folder: Path, notices: str) -> None:
    """Saves while the system limits files to 10 kB."""
    # Random values do not compress.
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(64, 512)), jnp.float32)
    state = state_on(training_mesh(MeshConfig()), ())._replace(trainable={"head": noise})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            checkpoints.save(state, Progress(3, DATA, 9, "base"))
            if notices == "wait":
                checkpoints.wait()
            if notices == "save":
                checkpoints.save(state, Progress(4, DATA, 9, "base"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("notices", ["wait", "save", "close"])
def test_a_full_disk_is_one_sentence(tmp_path, notices):
    """The save runs in the background, so the next call reports its error."""
    with pytest.raises(PshareError, match=r"^Cannot write a checkpoint to .*: File too large\.$"):
        save_without_room(tmp_path, notices)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == []


def test_more_devices_than_available():
    with pytest.raises(PshareError, match=r"16.*8"):
        training_mesh(MeshConfig(data=16))
