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
from pshare_jax.model.attention import dense as attention
from pshare_jax.model.layers import Projection
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.training.config import MeshConfig
from pshare_jax.training.data.batches import two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step import cross_entropy
from pshare_jax.training.step.mesh import shard_batch, training_mesh
from pshare_jax.training.step.objective import _set_dropout, decode_module, nll, trainable_module

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
    blocks = attention.QUERY_BLOCK, cross_entropy.CHUNK_LOGITS
    key = (module.objective, module.method, bool(module.frozen), *blocks)
    if key not in STEPS:

        def step(trainable, frozen, base, batch, key):
            return nll(module.objective, trainable, frozen, base, batch, key)

        STEPS[key] = quick_jit(step), quick_jit(jax.value_and_grad(step, has_aux=True))
    return STEPS[key]


def loss(module, trainable, batch, key=None):
    return float(compiled(module)[0](trainable, module.frozen, module.base.params, batch, key)[0])


def both(module, batch):
    """Loss, tallies and gradients."""
    step = compiled(module)[1]
    (total, tallies), slopes = step(module.trainable, module.frozen, module.base.params, batch, None)
    return float(total), tallies, slopes


def rows_of(found):
    """A packed row, a row with one sample, and an empty row."""
    return [found[:3], [found[3]], []]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_servers_score(models, kind):
    """Invariant 4: the sum over the turns, each scored as an answer on the base's KV of everything before it."""
    module, found = models.module(kind), samples(1)
    batch = packed("two_stream", rows_of(found))
    total, tallies = compiled(module)[0](module.trainable, module.frozen, module.base.params, batch, None)
    expected, count, correct = 0.0, 0, 0
    for sample in found:
        for start, end in sample.turns:
            scores = ps.score(models.shared, kind, sample.ids[:end], response_start=start)[start:]
            expected -= sum(one for one in scores if one is not None)
            count += len(scores)
            kv = models.shared.prefill([sample.ids[: start - 1]])
            logits, _ = models.shared.decode(kind, [sample.ids[start - 1 : end - 1]], kv)
            correct += int((np.asarray(logits[0]).argmax(-1) == np.array(sample.ids[start:end])).sum())
    assert (float(tallies.tokens), float(tallies.correct)) == (count, correct)
    assert float(total) == pytest.approx(expected, abs=1e-4 * count)


def check_gradients(module, monkeypatch):
    # Small enough for several blocks of queries and several chunks of logits.
    monkeypatch.setattr("pshare_jax.model.attention.dense.QUERY_BLOCK", 16)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 7 * 320)
    first, second = samples(2)[:2]
    found = [first, replace(second, turns=second.turns[:1])]
    total, _, slopes = both(module, packed(module.layout, [found, [], []]))
    reference = quick_jit(
        jax.value_and_grad(lambda trainable: sum(reference_nll(module, trainable, one) for one in found))
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
    slope = jax.grad(lambda base: nll(module.objective, module.trainable, {}, base, batch, None)[0])(module.base.params)
    assert all(float(jnp.abs(one).max()) == 0 for one in slope.values())
    # Other tokens in the first turn's decode stream leave the second turn's loss unchanged.
    second = batch._replace(weights=batch.weights * (batch.decode_turns == 2))
    tokens = np.where(batch.decode_turns == 1, (batch.decode_tokens + 1) % 320, batch.decode_tokens)
    changed = second._replace(decode_tokens=tokens.astype(np.int32))
    assert loss(module, module.trainable, second) == loss(module, module.trainable, changed)
    context = batch._replace(context_tokens=((batch.context_tokens + 1) % 320).astype(np.int32))
    assert loss(module, module.trainable, context) != loss(module, module.trainable, batch)


def test_samples_of_a_row_are_independent(llama):
    module, found = llama.module("lora"), samples(4)
    alone = sum(loss(module, module.trainable, packed("two_stream", [[one], [], []])) for one in found)
    together = loss(module, module.trainable, packed("two_stream", [found[:2], found[2:], []]))
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_conversation_costs_one_base_pass(llama):
    """Whatever the number of turns, the base reads each context token once and the module each answer token once."""
    (sample, *_) = samples(5)
    batch = packed("two_stream", [[sample]])
    assert int((batch.context_segments > 0).sum()) == sample.turns[-1][0] - 1
    assert int((batch.decode_turns > 0).sum()) == sum(end - start for start, end in sample.turns)


@pytest.mark.parametrize("kind", ["lora"])
def test_rematerialisation_changes_nothing(llama, kind):
    batch = packed("two_stream", rows_of(samples(6)))
    kept = both(llama.module(kind, remat=False), batch)
    again = both(llama.module(kind, remat=True), batch)
    assert kept[0] == pytest.approx(again[0], rel=1e-6)
    assert_gradients_agree(again[2], kept[2], 1e-6)
    for remat, layers in ((True, llama.base.config.num_layers), (False, 0)):
        module = llama.module(kind, remat=remat)
        arrays = module.trainable, module.frozen, module.base.params, batch, None
        jaxpr = jax.make_jaxpr(lambda *arrays, objective=module.objective: nll(objective, *arrays))(*arrays)
        assert str(jaxpr).count("remat2[") == layers


@pytest.mark.parametrize("kind", ["full"])
def test_bfloat16_computes_with_float32_masters(llama, kind):
    module = fresh(llama.base, "prefillshare", shape_of(kind), "bfloat16", 0)
    exact = fresh(llama.base, "prefillshare", shape_of(kind), "float32", 0)
    # One token repeated: in bfloat16 the sum of its gradients would stop at about 256 times one gradient.
    answers = [Sample((*ids, *[7] * 100), ((4, 104),), "test", 0) for ids in ((1, 2, 3, 4), (5, 6, 8, 9))]
    batch = two_stream([[one] for one in answers * 2], 4, 100)
    (total, _, slopes), (expected, _, wanted) = both(module, batch), both(exact, batch)
    assert {str(one.dtype) for one in (*slopes.values(), *module.trainable.values())} == {"float32"}
    assert {str(one.dtype) for one in module.base.params.values()} == {"bfloat16"}
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
    assert all((float(jnp.abs(one).max()) > 0) == path.endswith("lora_b") for path, one in second[2].items())
    again = fresh(llama.base, "prefillshare", shape_of("lora"), "float32", 0)
    other = fresh(llama.base, "prefillshare", shape_of("lora"), "float32", 1)
    path = "layers.0.attention.q.lora_a"
    assert (again.trainable[path] == lora.trainable[path]).all()
    assert (other.trainable[path] != lora.trainable[path]).any()
    # A tied base has no separate head.
    assert ("head" in full.trainable) is not llama.base.config.tied
    module = decode_module(lora, lora.trainable)
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
    decoder = module.objective.architecture.bind({**module.frozen, **module.trainable})
    _set_dropout(decoder, 0.5, jax.random.key(0))
    adapters = [one for _, one in nnx.iter_modules(decoder) if isinstance(one, Projection) and one.lora_a is not None]
    dropped = [np.asarray(one.drop(jnp.ones((4, 50, 50)))) for one in adapters if one.drop]
    assert len({one.tobytes() for one in dropped}) == len(adapters) == 4 * llama.base.config.num_layers
    assert all(set(np.unique(one)) == {0.0, 2.0} and abs(one.mean() - 1) < 0.05 for one in dropped)


@pytest.mark.parametrize("shape", [(2, 2, 2)], ids=str)
def test_meshes_give_the_same_loss_and_gradients(llama, shape):
    module = llama.module("full")
    batch = packed("two_stream", [[one] for one in samples(10)])
    expected = both(module, batch)
    mesh = training_mesh(MeshConfig(*shape))

    def placed(params):
        return {
            path: jax.device_put(x, parameter_sharding(path, module.base.config, mesh)) for path, x in params.items()
        }

    trainable, frozen, base = placed(module.trainable), placed(module.frozen), placed(module.base.params)
    on_mesh = replace(module, base=replace(module.base, params=base, mesh=mesh))
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
        return nll(module.objective, trainable, {}, module.base.params, batch, None)[0]

    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 32 * config.vocab_size)
    text = jax.jit(jax.grad(total)).lower(module.trainable, batch).compile().as_text()
    assert text is not None
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)}
    assert (32, config.vocab_size) in shapes
    assert max(math.prod(shape) for shape in shapes) < num_tokens * config.vocab_size


def test_a_module_without_targets_is_refused(tmp_path):
    base = ps.load(tiny_folder("llama", tmp_path, **SMALL["llama"]))
    with pytest.raises(ps.PshareError, match="targets"):
        trainable_module(base, "prefillshare", shape_of("lora", targets=("nothing",)), "float32")
