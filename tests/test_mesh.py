"""Meshes and shardings: the table covers every parameter, shards are real, and every pair of degrees gives the same ids."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny import FAMILIES, random_tokens, tiny_config, tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.mesh import same_devices
from pshare_jax.model.architecture import Architecture
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.kv.dense import DenseKV
from pshare_jax.model.layers import ATTENTION_TARGETS, MLP_TARGETS, LoraConfig
from pshare_jax.model.sharding import check_tensor_parallel, kv_sharding, parameter_sharding

DEGREES = (1, 2, 4)
NEW = 4


def config_of(family: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(tiny_config(family, **changes))


def shares(tree: Any) -> set[float]:
    """What part of its array each shard of each array holds, in bytes."""
    return {shard.data.nbytes / leaf.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


def used(kv: DenseKV) -> np.ndarray:
    return np.stack([np.asarray(x)[:, :, : kv.length] for layer in kv.layers for x in layer])


@dataclasses.dataclass
class Single:
    """A tiny Llama on one device: its folder, a prompt, its KV and what it generates."""

    folder: Any
    prompt: list[int]
    kv: np.ndarray
    ids: list[int]


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda heads: f"{heads} kv heads")
def single(request, tmp_path_factory) -> Single:
    # Weights of std 0.1, as for all parity of values: wider ones magnify the order of sums, which tp changes.
    changes = {"num_key_value_heads": request.param, "num_hidden_layers": 2, "std": 0.1}
    folder = tiny_folder("llama", tmp_path_factory.mktemp("tp"), **changes)
    shared = ps.factorize(ps.load(folder))
    shared.add_task("base", "base")
    for seed in range(100):
        prompt = random_tokens(seed, 20).tolist()
        rollout = ps.rollout(shared, "base", prompt, max_new_tokens=NEW, stop_ids=())
        if rollout.smallest_gap > 1e-3:
            return Single(folder, prompt, used(shared.prefill([prompt[:-1]])), rollout.ids)
    raise AssertionError("every prompt has a near-tie")


@pytest.mark.parametrize("decode_tp", DEGREES)
@pytest.mark.parametrize("prefill_tp", DEGREES)
def test_every_pair_of_degrees(single, prefill_tp, decode_tp):
    """A3-15: the same KV on both sides and the same ids as on one device; each device holds its share and no more."""
    prefill_mesh = ps.make_mesh(range(prefill_tp), prefill_tp)
    decode_mesh = ps.make_mesh(range(4, 4 + decode_tp), decode_tp)
    shared = ps.factorize(ps.load(single.folder, mesh=prefill_mesh), decode_mesh=decode_mesh)
    shared.add_task("base", "base")
    kv = shared.prefill([single.prompt[:-1]])
    moved = shared.transfer(kv)
    np.testing.assert_array_equal(used(moved), used(kv))
    for side, tp in ((kv, prefill_tp), (moved, decode_tp)):
        np.testing.assert_allclose(used(side), single.kv, rtol=0, atol=1e-5)
        heads = shared.config.num_kv_heads
        assert shares(side.layers) == {1 / tp if heads % tp == 0 else 1.0}
        assert {x.sharding for x in jax.tree.leaves(side.layers)} == {
            kv_sharding(shared.config, prefill_mesh if side is kv else decode_mesh)
        }
    assert {d.id for x in jax.tree.leaves(kv.layers) for d in x.devices()} == set(range(prefill_tp))
    assert {d.id for x in jax.tree.leaves(moved.layers) for d in x.devices()} == set(range(4, 4 + decode_tp))
    assert ps.continue_from(shared, "base", moved, single.prompt[-1], NEW, stop_ids=()).ids == single.ids
    _, longer = shared.decode("base", [[1]], moved.copy(32), donate=True)
    assert {x.sharding for x in jax.tree.leaves(longer.layers)} == {kv_sharding(shared.config, decode_mesh)}


@pytest.mark.parametrize("tp", [2, 4])
def test_parameters_are_cut_into_shares(single, tp):
    model = ps.load(single.folder, mesh=ps.make_mesh(range(tp), tp))
    moved = ps.load(single.folder).on(ps.make_mesh(range(4, 4 + tp), tp))
    whole = {path for path in model.params if path.endswith("norm.weight")}
    if model.config.num_kv_heads % tp:
        whole |= {path for path in model.params if path.endswith((".k.kernel", ".v.kernel"))}
    for params in (model.params, moved.params):
        for path, array in params.items():
            assert shares(array) == {1.0 if path in whole else 1 / tp}, path
            assert len(array.addressable_shards) == tp


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_modules_on_several_devices(kind, tmp_path):
    """A task's own weights are sharded as the base's; biases and every LoRA target are among them."""
    folder = tiny_folder("llama", tmp_path / "base", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    module = tiny_module(folder, tmp_path / kind, kind=kind)
    prompt = random_tokens(3, 9).tolist()
    rollouts = []
    for mesh in (ps.make_mesh([0], 1), ps.make_mesh([1, 2], 2)):
        shared = ps.factorize(ps.load(folder, mesh=mesh))
        shared.add_task("task", module)
        rollouts.append(ps.rollout(shared, "task", prompt, max_new_tokens=NEW, stop_ids=()))
    assert rollouts[0].smallest_gap > 1e-3
    assert rollouts[1].ids == rollouts[0].ids


def test_odd_vocabulary_stays_whole(tmp_path):
    """It cannot be cut evenly, and padding it would make tokens that the model does not have."""
    folder = tiny_folder("qwen3", tmp_path, num_hidden_layers=1, vocab_size=321, std=0.1)
    one, two = (ps.load(folder, mesh=ps.make_mesh(range(tp), tp)) for tp in (1, 2))
    assert shares(two.params["head"]) == shares(two.params["embedding.weight"]) == {1.0}
    tokens = random_tokens(0, 1, 9)
    assert one.logits(tokens).shape == (1, 9, 321)
    np.testing.assert_allclose(two.logits(tokens), one.logits(tokens), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_rule(family):
    biases = {"attention_bias": True, **({"mlp_bias": True} if family == "llama" else {})}
    config = config_of(family, tie_word_embeddings=False, **biases)
    lora = LoraConfig(rank=4, scale=1.0, targets=(*ATTENTION_TARGETS, *MLP_TARGETS))
    mesh = ps.make_mesh([0, 1], 2)
    for path, leaf in Architecture(config).with_lora(lora).shapes.items():
        spec = parameter_sharding(path, config, mesh).spec
        cut = [size for size, axis in zip(leaf.shape, spec, strict=False) if axis is not None]
        assert all(size % 2 == 0 for size in cut), path
        # LoRA's small side stays whole, its large side is cut where the kernel's is.
        if path.endswith("lora_a"):
            assert spec == (PartitionSpec("model", None) if ".o." in path or ".down." in path else PartitionSpec())
        if path.endswith("lora_b"):
            assert spec == (PartitionSpec() if ".o." in path or ".down." in path else PartitionSpec(None, "model"))
    with pytest.raises(AssertionError, match="no sharding rule for parameter layers"):
        parameter_sharding("layers.0.new.kernel", config, mesh)


@pytest.mark.parametrize(
    ("changes", "tp", "part"),
    [
        ({}, 3, "tp 3 does not divide the model's 4 query heads"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 108}, 8, "MLP size 108"),
        ({"hidden_size": 60, "num_attention_heads": 12, "head_dim": 16, "num_key_value_heads": 6}, 4, "6 kv heads"),
    ],
)
def test_refused_degrees(changes, tp, part):
    with pytest.raises(PshareError, match=part) as caught:
        check_tensor_parallel(config_of("llama", **changes), tp)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(".") == 1


def test_refused_degree_when_moving(tiny_folders):
    with pytest.raises(PshareError, match="tp 3 does not divide"):
        ps.factorize(ps.load(tiny_folders["llama"]), decode_mesh=ps.make_mesh([1, 2, 3], 3))


@pytest.mark.parametrize(
    ("ids", "tp", "part"),
    [
        ([0, 8], 2, "no device 8: JAX sees 8"),
        ([-1], 1, "no device -1"),
        ([0, 1], 1, "tp 1 needs 1 different devices, but \\[0, 1\\]"),
        ([0], 2, "tp 2 needs 2 different devices"),
        ([3, 3], 2, "tp 2 needs 2 different devices"),
    ],
)
def test_refused_meshes(ids, tp, part):
    with pytest.raises(PshareError, match=part):
        ps.make_mesh(ids, tp)


def test_same_devices():
    mesh = ps.make_mesh([1, 2], 2)
    assert same_devices(mesh, ps.make_mesh([1, 2], 2))
    assert not same_devices(mesh, ps.make_mesh([2, 1], 2))
    assert not same_devices(mesh, ps.make_mesh([1], 1))
