"""The training objective: its loss equals the server's score (invariant 4), its gradients equal a dense reference."""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from objective_models import (
    SMALL,
    BaseWithModules,
    assert_gradients_agree,
    fresh,
    packed,
    reference_nll,
    samples,
    shape_of,
)
from tiny import FAMILIES, tiny_folder

import pshare_jax as ps
from pshare_jax.model.attention import flash as attention
from pshare_jax.model.layer_stack import stacked_sharding
from pshare_jax.model.layers import Projection
from pshare_jax.training.config import MeshConfig
from pshare_jax.training.data.batches import two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step import chunks
from pshare_jax.training.step.mesh import shard_batch, training_mesh
from pshare_jax.training.step.objective import batch_loss, decode_module, trainable_module
from pshare_jax.training.step.streams import set_dropout

KINDS = ("full", "lora")


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tmp_path_factory):
    return BaseWithModules(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return BaseWithModules("llama", tmp_path_factory.mktemp("llama"))


STEPS: dict[Any, Any] = {}


def quick_jit(function):
    """jit without backend optimizations: compilation dominates the time of these tests."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def compiled(module):
    """(forward, forward and backward), compiled once per objective."""
    blocks = attention.QUERY_BLOCK, attention.KEY_BLOCK, chunks.CHUNK_LOGITS
    key = (module.objective, module.method, bool(module.frozen), *blocks)
    if key not in STEPS:

        def step(trainable, frozen, base, batch, key):
            return batch_loss(module.objective, trainable, frozen, base, batch, key)

        STEPS[key] = quick_jit(step), quick_jit(jax.value_and_grad(step, has_aux=True))
    return STEPS[key]


def loss(module, trainable, batch, key=None):
    return float(compiled(module)[0](trainable, module.frozen, module.base_params, batch, key)[0])


def both(module, batch):
    """Loss, tallies and gradients."""
    step = compiled(module)[1]
    (total, tallies), slopes = step(module.trainable, module.frozen, module.base_params, batch, None)
    return float(total), tallies, slopes


def rows_of(found):
    """A packed row, a row with one sample, and an empty row."""
    return [found[:3], [found[3]], []]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_servers_score(models, kind):
    """Invariant 4: the sum over the turns, each scored as an answer on the base's KV of everything before it."""
    module, found = models.module(kind), samples(1)
    batch = packed("two_stream", rows_of(found))
    total, tallies = compiled(module)[0](module.trainable, module.frozen, module.base_params, batch, None)
    expected, count, correct = 0.0, 0, 0
    for sample in found:
        for start, end in sample.turns:
            scores = ps.score(models.shared, kind, sample.ids[:end], response_start=start)[start:]
            expected -= sum(score for score in scores if score is not None)
            count += len(scores)
            kv = models.shared.prefill([sample.ids[: start - 1]])
            logits, _ = models.shared.decode(kind, [sample.ids[start - 1 : end - 1]], kv)
            correct += int((np.asarray(logits[0]).argmax(-1) == np.array(sample.ids[start:end])).sum())
    assert (float(tallies.tokens), float(tallies.correct)) == (count, correct)
    assert float(total) == pytest.approx(expected, abs=1e-4 * count)


def check_gradients(module, monkeypatch):
    # Small enough for several blocks of queries and several chunks of logits.
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    monkeypatch.setattr(attention, "KEY_BLOCK", 8)
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 7 * 320)
    first, second = samples(2)[:2]
    found = [first, replace(second, turns=second.turns[:1])]
    total, _, slopes = both(module, packed(module.layout, [found, [], []]))
    reference = quick_jit(
        jax.value_and_grad(lambda trainable: sum(reference_nll(module, trainable, sample) for sample in found))
    )
    expected, wanted = reference(module.trainable)
    assert total == pytest.approx(float(expected), rel=1e-5)
    assert_gradients_agree(slopes, wanted)


def test_gradients_equal_the_reference(models, monkeypatch):
    """One kind per family, since compilation is slow; both for llama."""
    for kind in {"llama": KINDS, "qwen3": ("lora",), "gemma3": ("full",)}[models.family]:
        check_gradients(models.module(kind), monkeypatch)


def test_gradients_of_full_fine_tuning_equal_the_reference(llama, monkeypatch):
    check_gradients(llama.module("full", "full_ft"), monkeypatch)


def test_turns_are_independent_and_the_base_is_constant(llama):
    """An earlier answer affects a later turn only through the base's KV, and no gradient reaches the base."""
    module, (sample, *_) = llama.module("full"), samples(3)
    batch = packed("two_stream", [[sample], [], []])
    grad_of_base = jax.grad(lambda base: batch_loss(module.objective, module.trainable, {}, base, batch, None)[0])
    slope = quick_jit(grad_of_base)(module.base_params)
    assert all(float(jnp.abs(grad).max()) == 0 for grad in slope.values())
    # Other tokens in the first turn's decode stream leave the second turn's loss unchanged.
    second = batch._replace(weights=batch.weights * (batch.decode_turns == 2))
    tokens = np.where(batch.decode_turns == 1, (batch.decode_tokens + 1) % 320, batch.decode_tokens)
    changed = second._replace(decode_tokens=tokens.astype(np.int32))
    assert loss(module, module.trainable, second) == loss(module, module.trainable, changed)
    context = batch._replace(context_tokens=((batch.context_tokens + 1) % 320).astype(np.int32))
    assert loss(module, module.trainable, context) != loss(module, module.trainable, batch)


def test_rematerialisation_changes_nothing(llama):
    batch, remats = packed("two_stream", rows_of(samples(6))), ("none", "layer", "dots")
    modules = {remat: llama.module("lora", remat=remat) for remat in remats}
    kept = both(modules["none"], batch)
    kept_bytes = {}
    for remat, module in modules.items():
        again = both(module, batch)
        assert kept[0] == pytest.approx(again[0], rel=1e-6)
        assert_gradients_agree(again[2], kept[2], 1e-6)
        arrays = module.frozen, module.base_params, batch, None
        _, pullback = jax.vjp(
            lambda trainable, m=module, a=arrays: batch_loss(m.objective, trainable, *a)[0], module.trainable
        )
        kept_bytes[remat] = sum(x.nbytes for x in jax.tree.leaves(pullback))
    assert kept_bytes["layer"] < kept_bytes["dots"] < kept_bytes["none"]


def test_bfloat16_computes_with_float32_masters(llama):
    module = fresh(llama.base, "prefillshare", shape_of("full"), "bfloat16")
    exact = fresh(llama.base, "prefillshare", shape_of("full"), "float32")
    # One token repeated: in bfloat16 the sum of its gradients would stop at about 256 times one gradient.
    answers = [Sample((*ids, *[7] * 100), ((4, 104),), "test", 0) for ids in ((1, 2, 3, 4), (5, 6, 8, 9))]
    batch = two_stream([[answer] for answer in answers * 2], 4, 100)
    (total, _, slopes), (expected, _, wanted) = both(module, batch), both(exact, batch)
    assert {str(x.dtype) for x in (*slopes.values(), *module.trainable.values())} == {"float32"}
    assert {str(x.dtype) for x in module.base_params.values()} == {"bfloat16"}
    assert total == pytest.approx(expected, rel=0.02)
    difference = np.linalg.norm(slopes["embedding.weight"] - wanted["embedding.weight"])
    assert difference < 0.01 * np.linalg.norm(wanted["embedding.weight"])


def test_a_fresh_module_is_the_base(llama):
    """Full: its weights; LoRA: B is zero, so that only B has a gradient."""
    batch = packed("two_stream", rows_of(samples(8)))
    full = fresh(llama.base, "prefillshare", shape_of("full"), "float32", 0)
    lora = fresh(llama.base, "prefillshare", shape_of("lora"), "float32", 0)
    first, second = both(full, batch), both(lora, batch)
    assert first[0] == pytest.approx(second[0], rel=1e-6)
    assert all((float(jnp.abs(x).max()) > 0) == path.endswith("lora_b") for path, x in second[2].items())
    again = fresh(llama.base, "prefillshare", shape_of("lora"), "float32", 0)
    other = fresh(llama.base, "prefillshare", shape_of("lora"), "float32", 1)
    path = "layers.0:2:1.attention.q.lora_a"
    assert (again.trainable[path] == lora.trainable[path]).all()
    assert (other.trainable[path] != lora.trainable[path]).any()
    # A tied base has no separate head.
    assert ("head" in full.trainable) is not llama.base.config.tied
    module = decode_module(lora.objective, lora.trainable, llama.base.params)
    assert module.architecture.lora is not None
    assert module.architecture.lora.scale == 1.5


def test_dropout_is_a_function_of_the_key(llama):
    module = llama.module("lora", dropout=0.5)
    batch = packed("two_stream", rows_of(samples(9)))

    def with_key(seed):
        return loss(module, module.trainable, batch, jax.random.key(seed))

    without = loss(module, module.trainable, batch)
    assert with_key(1) == with_key(1)
    assert len({with_key(1), with_key(2), without}) == 3
    # Dropout applies only to the input of A: with B = 0 it has no effect.
    silent = {path: x * (not path.endswith("lora_b")) for path, x in module.trainable.items()}
    assert loss(module, silent, batch, jax.random.key(1)) == pytest.approx(loss(module, silent, batch), rel=1e-6)
    # Half the inputs are 0 and the others doubled, with a separate mask for each adapter.
    layer = module.objective.architecture.bind_layer(
        0, {path: x[0] for path, x in over_prefix({**module.frozen, **module.trainable}, "layers.0:2:1.").items()}
    )
    set_dropout(layer, 0.5, jax.random.key(0))
    adapters = [node for _, node in nnx.iter_modules(layer) if isinstance(node, Projection) and node.lora_a is not None]
    dropped = [np.asarray(node.drop(jnp.ones((4, 50, 50)))) for node in adapters if node.drop]
    assert len({node.tobytes() for node in dropped}) == len(adapters) == 4
    assert all(set(np.unique(node)) == {0.0, 2.0} and abs(node.mean() - 1) < 0.05 for node in dropped)


def over_prefix(params, prefix):
    return {path.removeprefix(prefix): x for path, x in params.items() if path.startswith(prefix)}


def test_a_mesh_gives_the_same_loss_and_gradients(llama):
    module = llama.module("full")
    batch = packed("two_stream", [[sample] for sample in samples(10)])
    expected = both(module, batch)
    mesh = training_mesh(MeshConfig(2, 2, 2))

    def placed(params):
        return {path: jax.device_put(x, stacked_sharding(path, module.base.config, mesh)) for path, x in params.items()}

    trainable, frozen, base = placed(module.trainable), placed(module.frozen), placed(module.base_params)
    on_mesh = replace(module, objective=replace(module.objective, mesh=mesh))
    whole = sum(x.nbytes for x in trainable.values())
    one_device = sum(x.addressable_shards[0].data.nbytes for x in trainable.values())
    assert one_device < 0.3 * whole
    step = compiled(on_mesh)[1]
    (total, tallies), slopes = step(trainable, frozen, base, shard_batch(batch, mesh), None)
    assert float(total) == pytest.approx(expected[0], rel=1e-5)
    assert float(tallies.correct) == float(expected[1].correct)
    assert_gradients_agree(jax.device_get(slopes), jax.device_get(expected[2]))


def test_the_logits_of_all_tokens_never_exist(llama, monkeypatch):
    """No array of the compiled step is as large as all logits."""
    config = llama.base.config
    answer = Sample((1, 2, 3, *[7] * 20), ((3, 23),), "test", 0)
    batch = two_stream([[answer]] * 16, 4, 24)
    num_tokens = batch.targets.size
    module = llama.module("full")

    def total(trainable, batch):
        return batch_loss(module.objective, trainable, {}, module.base_params, batch, None)[0]

    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 32 * config.vocab_size)
    text = jax.jit(jax.grad(total)).lower(module.trainable, batch).compile().as_text()
    assert text is not None
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)}
    assert (32, config.vocab_size) in shapes
    assert max(math.prod(shape) for shape in shapes) < num_tokens * config.vocab_size


def test_a_module_without_targets_is_refused(tmp_path):
    base = ps.load(tiny_folder("llama", tmp_path, **SMALL["llama"]))
    with pytest.raises(ps.PshareError, match="targets"):
        trainable_module(base, "prefillshare", shape_of("lora", targets=("nothing",)), "float32")
