"""The training objective: invariant 4 (it is what the server would score), and gradients of a plain dense reference."""

import math
import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from objective_world import SMALL, World, assert_gradients_agree, fresh, packed, reference_nll, samples, shape_of
from tiny import FAMILIES, tiny_folder

import pshare_jax as ps
from pshare_jax.model.attention import dense as attention
from pshare_jax.model.layers import Projection
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.training.config import MeshConfig
from pshare_jax.training.data.batches import two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step import cross_entropy
from pshare_jax.training.step.mesh import put_batch, training_mesh
from pshare_jax.training.step.objective import _set_dropout, decode_module, make_trainee, nll

KINDS = ("full", "lora")


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return World("llama", tmp_path_factory.mktemp("llama"))


STEPS: dict[Any, Any] = {}


def quick_jit(function):
    """The same program in machine code that nobody tried to make fast: compiling is what these tests wait for."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def compiled(trainee):
    """(forward, forward and backward) of everything but the arrays, compiled once for all that is equal."""
    blocks = attention.QUERY_BLOCK, cross_entropy.CHUNK_LOGITS
    key = (trainee.objective, trainee.method, bool(trainee.frozen), *blocks)
    if key not in STEPS:

        def step(trainable, frozen, base, batch, key):
            return nll(trainee.objective, trainable, frozen, base, batch, key)

        STEPS[key] = quick_jit(step), quick_jit(jax.value_and_grad(step, has_aux=True))
    return STEPS[key]


def loss(trainee, trainable, batch, key=None):
    return float(compiled(trainee)[0](trainable, trainee.frozen, trainee.base.params, batch, key)[0])


def both(trainee, batch):
    """Loss, tallies and gradients."""
    step = compiled(trainee)[1]
    (total, tallies), slopes = step(trainee.trainable, trainee.frozen, trainee.base.params, batch, None)
    return float(total), tallies, slopes


def rows_of(found):
    """Packed and alone, with an empty row."""
    return [found[:3], [found[3]], []]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_what_the_server_scores(world, kind):
    """Invariant 4: the sum over the turns, each as a begun answer on the base's KV of everything before it."""
    trainee, found = world.trainee(kind), samples(1)
    batch = packed("two_stream", rows_of(found))
    total, tallies = compiled(trainee)[0](trainee.trainable, trainee.frozen, trainee.base.params, batch, None)
    expected, count, correct = 0.0, 0, 0
    for sample in found:
        for start, end in sample.turns:
            scores = ps.score(world.shared, kind, sample.ids[:end], response_start=start)[start:]
            expected -= sum(one for one in scores if one is not None)
            count += len(scores)
            kv = world.shared.prefill([sample.ids[: start - 1]])
            logits, _ = world.shared.decode(kind, [sample.ids[start - 1 : end - 1]], kv)
            correct += int((np.asarray(logits[0]).argmax(-1) == np.array(sample.ids[start:end])).sum())
    assert (float(tallies.tokens), float(tallies.correct)) == (count, correct)
    assert float(total) == pytest.approx(expected, abs=1e-4 * count)


def check_gradients(trainee, monkeypatch):
    # Several blocks of queries and several chunks of logits even at these lengths.
    monkeypatch.setattr("pshare_jax.model.attention.dense.QUERY_BLOCK", 16)
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 7 * 320)
    first, second = samples(2)[:2]
    found = [first, replace(second, turns=second.turns[:1])]
    total, _, slopes = both(trainee, packed(trainee.layout, [found, [], []]))
    reference = quick_jit(
        jax.value_and_grad(lambda trainable: sum(reference_nll(trainee, trainable, one) for one in found))
    )
    expected, wanted = reference(trainee.trainable)
    assert total == pytest.approx(float(expected), rel=1e-5)
    assert_gradients_agree(slopes, wanted)


def test_gradients_equal_the_plain_references(world, monkeypatch):
    """Every family with one kind (compiling takes long), one with both."""
    for kind in {"llama": KINDS, "qwen3": ("lora",), "gemma3": ("full",)}[world.family]:
        check_gradients(world.trainee(kind), monkeypatch)


def test_gradients_of_full_fine_tuning_equal_the_plain_references(llama, monkeypatch):
    check_gradients(llama.trainee("full", "full_ft"), monkeypatch)


def test_turns_are_apart_and_the_base_is_a_constant(llama):
    """Another answer in an earlier turn changes a later turn only through the base's KV, and no slope reaches the base."""
    trainee, (sample, *_) = llama.trainee("full"), samples(3)
    batch = packed("two_stream", [[sample], [], []])
    slope = jax.grad(lambda base: nll(trainee.objective, trainee.trainable, {}, base, batch, None)[0])(
        trainee.base.params
    )
    assert all(float(jnp.abs(one).max()) == 0 for one in slope.values())
    # The first turn's stream alone is fed other tokens: the second turn's loss stays.
    second = batch._replace(weights=batch.weights * (batch.decode_turns == 2))
    tokens = np.where(batch.decode_turns == 1, (batch.decode_tokens + 1) % 320, batch.decode_tokens)
    changed = second._replace(decode_tokens=tokens.astype(np.int32))
    assert loss(trainee, trainee.trainable, second) == loss(trainee, trainee.trainable, changed)
    context = batch._replace(context_tokens=((batch.context_tokens + 1) % 320).astype(np.int32))
    assert loss(trainee, trainee.trainable, context) != loss(trainee, trainee.trainable, batch)


def test_samples_of_a_row_are_apart(llama):
    trainee, found = llama.trainee("lora"), samples(4)
    alone = sum(loss(trainee, trainee.trainable, packed("two_stream", [[one], [], []])) for one in found)
    together = loss(trainee, trainee.trainable, packed("two_stream", [found[:2], found[2:], []]))
    assert together == pytest.approx(alone, rel=1e-5)


def test_a_conversation_costs_one_base_pass(llama):
    """However many turns: every context token goes through the base once, every answer token through the module once."""
    (sample, *_) = samples(5)
    batch = packed("two_stream", [[sample]])
    assert int((batch.context_segments > 0).sum()) == sample.turns[-1][0] - 1
    assert int((batch.decode_turns > 0).sum()) == sum(end - start for start, end in sample.turns)


@pytest.mark.parametrize("kind", ["lora"])
def test_rematerialisation_changes_nothing(llama, kind):
    batch = packed("two_stream", rows_of(samples(6)))
    kept = both(llama.trainee(kind, remat=False), batch)
    again = both(llama.trainee(kind, remat=True), batch)
    assert kept[0] == pytest.approx(again[0], rel=1e-6)
    assert_gradients_agree(again[2], kept[2], 1e-6)
    for remat, layers in ((True, llama.base.config.num_layers), (False, 0)):
        trainee = llama.trainee(kind, remat=remat)
        arrays = trainee.trainable, trainee.frozen, trainee.base.params, batch, None
        jaxpr = jax.make_jaxpr(lambda *arrays, objective=trainee.objective: nll(objective, *arrays))(*arrays)
        assert str(jaxpr).count("remat2[") == layers


@pytest.mark.parametrize("kind", ["full"])
def test_bfloat16_computes_with_float32_masters(llama, kind):
    trainee = fresh(llama.base, "prefillshare", shape_of(kind), "bfloat16", 0)
    exact = fresh(llama.base, "prefillshare", shape_of(kind), "float32", 0)
    # The same token over and over: in bfloat16 a sum of its slopes would not grow beyond some 256 times one of them.
    answers = [Sample((*ids, *[7] * 100), ((4, 104),), "test", 0) for ids in ((1, 2, 3, 4), (5, 6, 8, 9))]
    batch = two_stream([[one] for one in answers * 2], 4, 100)
    (total, _, slopes), (expected, _, wanted) = both(trainee, batch), both(exact, batch)
    assert {str(one.dtype) for one in (*slopes.values(), *trainee.trainable.values())} == {"float32"}
    assert {str(one.dtype) for one in trainee.base.params.values()} == {"bfloat16"}
    assert total == pytest.approx(expected, rel=0.02)
    difference = np.linalg.norm(slopes["embedding.weight"] - wanted["embedding.weight"])
    assert difference < 0.01 * np.linalg.norm(wanted["embedding.weight"])


def test_a_fresh_module_is_the_base(llama):
    """Full: its weights; LoRA: B is zero, so that only B has a slope."""
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
    # Of a tied base one leaf holds both uses.
    assert ("head" in full.trainable) is not llama.base.config.tied
    module = decode_module(lora, lora.trainable)
    assert module.architecture.lora is not None
    assert module.architecture.lora.scale == 1.5


def test_dropout_is_a_function_of_the_key(llama):
    trainee = llama.trainee("lora", dropout=0.5)
    batch = packed("two_stream", rows_of(samples(9)))

    def with_key(seed):
        return loss(trainee, trainee.trainable, batch, jax.random.key(seed))

    without = loss(trainee, trainee.trainable, batch)
    assert with_key(1) == with_key(1)
    assert len({with_key(1), with_key(2), without}) == 3
    # Nothing but what goes into A is dropped out: without B it has no effect.
    silent = {path: x * (not path.endswith("lora_b")) for path, x in trainee.trainable.items()}
    assert loss(trainee, silent, batch, jax.random.key(1)) == pytest.approx(loss(trainee, silent, batch), rel=1e-6)
    # Half the inputs, and the others doubled, by a mask of its own for every adapter.
    decoder = trainee.objective.architecture.bind({**trainee.frozen, **trainee.trainable})
    _set_dropout(decoder, 0.5, jax.random.key(0))
    adapters = [one for _, one in nnx.iter_modules(decoder) if isinstance(one, Projection) and one.lora_a is not None]
    dropped = [np.asarray(one.drop(jnp.ones((4, 50, 50)))) for one in adapters if one.drop]
    assert len({one.tobytes() for one in dropped}) == len(adapters) == 4 * llama.base.config.num_layers
    assert all(set(np.unique(one)) == {0.0, 2.0} and abs(one.mean() - 1) < 0.05 for one in dropped)


@pytest.mark.parametrize("shape", [(2, 2, 2)], ids=str)
def test_meshes_give_the_same_loss_and_gradients(llama, shape):
    trainee = llama.trainee("full")
    batch = packed("two_stream", [[one] for one in samples(10)])
    expected = both(trainee, batch)
    mesh = training_mesh(MeshConfig(*shape))

    def placed(params):
        return {
            path: jax.device_put(x, parameter_sharding(path, trainee.base.config, mesh)) for path, x in params.items()
        }

    trainable, frozen, base = placed(trainee.trainable), placed(trainee.frozen), placed(trainee.base.params)
    on_mesh = replace(trainee, base=replace(trainee.base, params=base, mesh=mesh))
    whole = sum(x.nbytes for x in trainable.values())
    one_device = sum(x.addressable_shards[0].data.nbytes for x in trainable.values())
    assert one_device < 0.3 * whole
    step = compiled(on_mesh)[1]
    (total, tallies), slopes = step(trainable, frozen, base, put_batch(batch, mesh), None)
    assert float(total) == pytest.approx(expected[0], rel=1e-5)
    assert float(tallies.correct) == float(expected[1].correct)
    assert_gradients_agree(jax.device_get(slopes), jax.device_get(expected[2]))


def test_logits_never_exist_whole(llama, monkeypatch):
    """No array of the compiled step is as large as all logits, in whatever shape."""
    config = llama.base.config
    answer = Sample((1, 2, 3, *[7] * 20), ((3, 23),), "test", 0)
    batch = two_stream([[answer]] * 16, 4, 24)
    num_tokens = batch.targets.size
    trainee = llama.trainee("full")

    def total(trainable, batch):
        return nll(trainee.objective, trainable, {}, trainee.base.params, batch, None)[0]

    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 32 * config.vocab_size)
    text = jax.jit(jax.grad(total)).lower(trainee.trainable, batch).compile().as_text()
    assert text is not None
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)}
    assert (32, config.vocab_size) in shapes
    assert max(math.prod(shape) for shape in shapes) < num_tokens * config.vocab_size


def test_a_module_without_targets_is_refused(tmp_path):
    base = ps.load(tiny_folder("llama", tmp_path, **SMALL["llama"]))
    with pytest.raises(ps.PshareError, match="targets"):
        make_trainee(base, "prefillshare", shape_of("lora", targets=("nothing",)), "float32")
