"""The split model as NNX modules: one array of the base for all, the oracle's answers, training's gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from objective_models import BaseWithModules, assert_gradients_agree, by_layer, packed, samples
from tiny import FAMILIES, random_tokens

import pshare_jax as ps
from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.dense_steps import KVLayers
from pshare_jax.model.kv.dense import DenseKV
from pshare_jax.share.nnx_view import TRAINABLE, BaseParam, DecodeView, PrefillView, SharedView, nnx_view
from pshare_jax.training.step.objective import batch_loss

NEW = 6
Turns = tuple[tuple[int, int], ...]


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory) -> BaseWithModules:
    made = BaseWithModules(request.param, tmp_path_factory.mktemp(request.param))
    made.shared.add_task("base", "base")
    module = made.shared.task_modules.module("full")
    # Half of this module is the base's own.
    params = {path: jnp.copy(x) if "mlp" in path else made.base.params[path] for path, x in module.params.items()}
    made.shared.add_task("mixed", replace(module, params=params))
    return made


@pytest.fixture(scope="module")
def view(made) -> SharedView:
    return nnx_view(made.base, {task: made.shared.task_modules.module(task) for task in made.shared.tasks})


def arrays(node: object, *filters: object) -> list[jax.Array]:
    return jax.tree.leaves(nnx.state(node, *filters))


def test_every_array_of_the_base_is_there_once_and_not_a_copy(made, view):
    ids = [id(array) for array in arrays(view)]
    assert len(ids) == len(set(ids))
    assert {id(array) for array in arrays(view, BaseParam)} == {id(array) for array in made.base.params.values()}
    own = {
        id(array)
        for task in made.shared.tasks
        for path, array in made.shared.task_modules.module(task).params.items()
        if array is not made.base.params.get(path)
    }
    assert {id(array) for array in arrays(view, TRAINABLE)} == own
    assert len(ids) == len(made.base.params) + len(own)


def test_a_change_of_the_base_is_one_for_all(made):
    """By reference: there is one variable, not one for each task."""
    view = nnx_view(made.base, {task: made.shared.task_modules.module(task) for task in ("base", "lora", "mixed")})
    for task in view.tasks:
        assert view.tasks[task].decoder.embedding.weight is view.prefill.decoder.embedding.weight
    assert view.tasks["mixed"].decoder.layers[0].mlp.up.kernel is not view.prefill.decoder.layers[0].mlp.up.kernel


def test_what_a_task_may_train(made, view):
    names = {
        task: {
            ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(view.tasks[task].decoder, TRAINABLE))
        }
        for task in made.shared.tasks
    }
    paths = set(made.base.params)
    assert names["base"] == set()
    assert names["full"] == paths
    assert names["mixed"] == {path for path in paths if "mlp" in path}
    assert names["lora"] == {path for path in made.shared.task_modules.module("lora").params if is_lora(path)}


@nnx.jit(graph_updates=False)
def prefill(view, tokens):
    return view(tokens)


@nnx.jit(graph_updates=False)
def decode(view, tokens, start, kv):
    return view(tokens, start, kv)


def answered(view: SharedView, task: str, prompt: list[int]) -> list[int]:
    """Greedy ids by the views alone."""
    *context, token = prompt
    kv = DenseKV(prefill(view.prefill, jnp.asarray([context])), len(context)).grown(len(prompt) + NEW).layers
    ids: list[int] = []
    for position in range(len(context), len(context) + NEW):
        logits, kv = decode(view.tasks[task], jnp.asarray([[token]]), jnp.int32(position), kv)
        token = int(logits[0, -1].argmax())
        ids.append(token)
    return ids


def test_the_views_answer_as_the_oracle_does(made, view):
    for task in made.shared.tasks:
        prompt, ids = clear_prompt(made.shared, task)
        assert answered(view, task, prompt) == ids


def clear_prompt(shared: ps.SharedModel, task: str) -> tuple[list[int], list[int]]:
    """A prompt without near-ties, and the oracle's answer."""
    for seed in range(100):
        prompt = random_tokens(seed, 21).tolist()
        rollout = ps.rollout(shared, task, prompt, max_new_tokens=NEW, stop_ids=())
        if rollout.smallest_gap > 1e-4:
            return prompt, rollout.ids
    raise AssertionError("no prompt is clear")


def test_a_context_may_be_prefilled_in_pieces(view):
    tokens = jnp.asarray(random_tokens(3, 1, 20))
    whole = prefill(view.prefill, tokens)
    room = DenseKV(prefill(view.prefill, tokens[:, :7]), 7).grown(20).layers
    pieces = nnx.jit(lambda view, *more: view(*more), graph_updates=False)(view.prefill, tokens[:, 7:], 7, room)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(one, other[:, :, :20], atol=1e-4)


def contexts(view: PrefillView, ids: jax.Array, turns: Turns) -> list[KVLayers]:
    """The base's KV before each turn, with room for it."""
    made = [(prefill(view, ids[:, : start - 1]), start - 1, end) for start, end in turns]
    return [DenseKV(layers, length).grown(end).layers for layers, length, end in made]


def summed_nll(view: DecodeView, kvs: list[KVLayers], ids: jax.Array, turns: Turns) -> jax.Array:
    """-log p of the turns' tokens, each turn on the KV of all before it."""
    total = jnp.float32(0)
    for (start, end), kv in zip(turns, kvs, strict=True):
        logits, _ = view(ids[:, start - 1 : end - 1], start - 1, kv)
        total -= jnp.take_along_axis(jax.nn.log_softmax(logits[0]), ids[0, start:end, None], axis=1).sum()
    return total


loss_and_gradient = nnx.jit(
    nnx.value_and_grad(summed_nll, argnums=nnx.DiffState(0, TRAINABLE)), static_argnums=3, graph_updates=False
)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_filters_gradient_is_trainings(made, view, kind):
    sample = next(sample for sample in samples() if len(sample.turns) == 2 and sample.turns[0][0] > 1)
    ids = jnp.asarray([sample.ids])
    _, got = loss_and_gradient(view.tasks[kind], contexts(view.prefill, ids, sample.turns), ids, sample.turns)
    ours = {".".join(map(str, path[1:])): x[...] for path, x in nnx.to_flat_state(got)}
    module, batch = made.module(kind), packed("two_stream", [[sample]])
    fixed = module.frozen, module.base_params, batch, None
    slopes = jax.jit(jax.grad(lambda trainable: batch_loss(module.objective, trainable, *fixed)[0]))(module.trainable)
    assert_gradients_agree(ours, by_layer(module, slopes))


def test_an_optimizer_changes_the_task_and_nothing_else(made):
    """NNX's own optimizer with optax; the arrays of base and other tasks stay the same objects."""
    view = nnx_view(made.base, {task: made.shared.task_modules.module(task) for task in ("lora", "full")})
    ids, turns, task = jnp.asarray([samples()[0].ids]), samples()[0].turns, view.tasks["lora"]
    others = [id(array) for array in [*arrays(view, BaseParam), *arrays(view.tasks["full"], TRAINABLE)]]
    optimizer, losses = nnx.Optimizer(task, optax.sgd(0.001), wrt=TRAINABLE), []
    kvs = contexts(view.prefill, ids, turns)
    for _ in range(3):
        loss, gradient = loss_and_gradient(task, kvs, ids, turns)
        optimizer.update(task, gradient)
        losses.append(float(loss))
    assert losses[0] > losses[1] > losses[2]
    kept = [*arrays(view, BaseParam), *arrays(view.tasks["full"], TRAINABLE)]
    np.testing.assert_array_equal(kept[0], made.base.params["embedding.weight"])
    assert [id(array) for array in kept] == others


def test_a_module_on_other_devices_is_refused(made):
    other = made.base.on(ps.make_mesh([1]))
    module = ps.DecodeModule(other.architecture, other.params, other.mesh)
    with pytest.raises(PshareError, match="'far' is not on the devices of the base"):
        nnx_view(made.base, {"far": module})
