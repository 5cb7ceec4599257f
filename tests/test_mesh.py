"""Meshes and shardings: every parameter has a rule, shards are real, and every pair of degrees gives the same ids."""

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
from pshare_jax.model.layers import LoraConfig
from pshare_jax.model.sharding import check_tensor_parallel, kv_sharding, parameter_sharding

DEGREES = (1, 2, 4)
NEW = 4


def config_of(family: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(tiny_config(family, **changes))


def shares(tree: Any) -> set[float]:
    """Each shard's share of its array, in bytes."""
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
    # Weights of std 0.1, as in all comparisons of values: larger weights magnify the order of sums, which tp changes.
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
    """A3-15: KV and ids equal those of one device; each device holds only its share."""
    prefill_mesh = ps.make_mesh(range(prefill_tp))
    decode_mesh = ps.make_mesh(range(4, 4 + decode_tp))
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
def test_parameters_are_sharded(single, tp):
    model = ps.load(single.folder, mesh=ps.make_mesh(range(tp)))
    moved = ps.load(single.folder).on(ps.make_mesh(range(4, 4 + tp)))
    whole = {path for path in model.params if path.endswith("norm.weight")}
    if model.config.num_kv_heads % tp:
        whole |= {path for path in model.params if path.endswith((".k.kernel", ".v.kernel"))}
    for params in (model.params, moved.params):
        for path, array in params.items():
            assert shares(array) == {1.0 if path in whole else 1 / tp}, path
            assert len(array.addressable_shards) == tp


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_modules_on_several_devices(kind, tmp_path):
    """A task's own weights, biases and all LoRA targets included, are sharded as the base's."""
    folder = tiny_folder("llama", tmp_path / "base", num_hidden_layers=1, attention_bias=True, mlp_bias=True)
    module = tiny_module(folder, tmp_path / kind, kind=kind)
    prompt = random_tokens(3, 9).tolist()
    rollouts = []
    for mesh in (ps.make_mesh([0]), ps.make_mesh([1, 2])):
        shared = ps.factorize(ps.load(folder, mesh=mesh))
        shared.add_task("task", module)
        rollouts.append(ps.rollout(shared, "task", prompt, max_new_tokens=NEW, stop_ids=()))
    assert rollouts[0].smallest_gap > 1e-3
    assert rollouts[1].ids == rollouts[0].ids


def test_indivisible_vocabulary_is_replicated(tmp_path):
    folder = tiny_folder("qwen3", tmp_path, num_hidden_layers=1, vocab_size=321, std=0.1)
    one, two = (ps.load(folder, mesh=ps.make_mesh(range(tp))) for tp in (1, 2))
    assert shares(two.params["head"]) == shares(two.params["embedding.weight"]) == {1.0}
    tokens = random_tokens(0, 1, 9)
    assert one.logits(tokens).shape == (1, 9, 321)
    np.testing.assert_allclose(two.logits(tokens), one.logits(tokens), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_rule(family):
    biases = {"attention_bias": True, **({"mlp_bias": True} if family == "llama" else {})}
    config = config_of(family, tie_word_embeddings=False, **biases)
    lora = LoraConfig(rank=4, scale=1.0, targets=("q", "k", "v", "o", "gate", "up", "down"))
    mesh = ps.make_mesh([0, 1])
    for path, leaf in Architecture(config).with_lora(lora).shapes.items():
        spec = parameter_sharding(path, config, mesh).spec
        cut = [size for size, axis in zip(leaf.shape, spec, strict=False) if axis is not None]
        assert all(size % 2 == 0 for size in cut), path
        # LoRA's rank axis is replicated, the other axis is sharded as the kernel's.
        if path.endswith("lora_a"):
            assert spec == (PartitionSpec("model", None) if ".o." in path or ".down." in path else PartitionSpec())
        if path.endswith("lora_b"):
            assert spec == (PartitionSpec() if ".o." in path or ".down." in path else PartitionSpec(None, "model"))
    with pytest.raises(AssertionError, match="no sharding rule for parameter layers"):
        parameter_sharding("layers.0.new.kernel", config, mesh)


@pytest.mark.parametrize(
    ("changes", "tp", "part"),
    [
        ({}, 3, "4 query heads"),
        ({"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 108}, 8, "MLP size 108"),
        ({"hidden_size": 60, "num_attention_heads": 12, "head_dim": 16, "num_key_value_heads": 6}, 4, "6 kv heads"),
    ],
)
def test_degree_that_does_not_divide_is_an_error(changes, tp, part):
    with pytest.raises(PshareError, match=rf"tp {tp}\b.*{part}"):
        check_tensor_parallel(config_of("llama", **changes), tp)


def test_degree_is_checked_when_a_model_moves(tiny_folders):
    with pytest.raises(PshareError, match="tp 3"):
        ps.factorize(ps.load(tiny_folders["llama"]), decode_mesh=ps.make_mesh([1, 2, 3]))


@pytest.mark.parametrize(
    ("ids", "named"), [([0, 8], "device 8.*0 to 7"), ([-1], "device -1"), ([], r"\[\]"), ([3, 3], r"\[3, 3\]")]
)
def test_mesh_of_missing_or_repeated_devices_is_an_error(ids, named):
    with pytest.raises(PshareError, match=named):
        ps.make_mesh(ids)


def test_same_devices():
    mesh = ps.make_mesh([1, 2])
    assert same_devices(mesh, ps.make_mesh([1, 2]))
    assert not same_devices(mesh, ps.make_mesh([2, 1]))
    assert not same_devices(mesh, ps.make_mesh([1]))
