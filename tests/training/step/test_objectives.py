"""Distillation and DPO: values and gradients equal their formulas over all logits at once, and the log-probabilities are
those that the server gives.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_losses import answer_logits, guide_of, pairs, quick_jit, whole, with_loss
from objective_models import BaseWithModules, assert_gradients_agree, packed, samples

import pshare_jax as ps
from pshare_jax.training.step import chunks
from pshare_jax.training.step.distillation import Distillation
from pshare_jax.training.step.dpo import Dpo, answer_numbers
from pshare_jax.training.step.guide import guide_batch
from pshare_jax.training.step.objective import batch_loss

# Kind of the module, of the second model, method, family: tied and softcapped heads are those of gemma3, qwen3 is untied.
CASES = [
    ("lora", "full", "prefillshare", "gemma3"),
    ("full", "lora", "prefillshare", "qwen3"),
    ("full", "full", "full_ft", "gemma3"),
    ("lora", "lora", "full_ft", "qwen3"),
]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {name: BaseWithModules(name, tmp_path_factory.mktemp(name)) for name in ("gemma3", "qwen3")}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 11 * 320)


def slopes_of(module, batch) -> tuple[float, Any, Any]:
    """Loss, tallies and gradients."""
    step = quick_jit(
        jax.value_and_grad(
            lambda trainable: batch_loss(module.objective, trainable, *_fixed(module), batch, None), has_aux=True
        )
    )
    (total, tallies), slopes = step(module.trainable)
    return float(total), tallies, slopes


def _fixed(module):
    return module.frozen, module.base_params


def dense_slopes(module, formula) -> tuple[float, Any]:
    """The formula of all parameters, and its gradients."""
    value, slopes = quick_jit(jax.value_and_grad(lambda trainable: formula({**module.frozen, **trainable})))(
        module.trainable
    )
    return float(value), slopes


def dense_divergence(ours, theirs, top_k, temperature):
    """KL(teacher || module) of each token, over all tokens or the teacher's best and all others."""
    p, q = (jax.nn.softmax(logits / temperature) for logits in (theirs, ours))
    if top_k is not None:
        best = jnp.argsort(-p, axis=-1)[:, :top_k]
        p, q = (
            jnp.concatenate([chosen, 1 - chosen.sum(-1, keepdims=True)], -1)
            for chosen in (jnp.take_along_axis(x, best, -1) for x in (p, q))
        )
    return (p * (jnp.log(p) - jnp.log(q))).sum(-1)


def turns_of(found):
    return [(sample.ids[:end], start) for sample in found for start, end in sample.turns]


@pytest.mark.parametrize(("kind", "teacher_kind", "method", "family"), CASES)
@pytest.mark.parametrize("top_k", [None, 5])
def test_distillation_equals_the_formula(worlds, kind, teacher_kind, method, family, top_k):
    # Of few turns, since each is compiled: a packed row, and an empty one.
    world, found = worlds[family], samples(1)[:2]
    module = with_loss(world.module(kind, method), Distillation(0.7, 2.0, top_k))
    teacher = world.module(teacher_kind, "full_ft")
    batch = guide_of(module, teacher)(packed(module.layout, [found, []]))
    total, tallies, slopes = slopes_of(module, batch)

    known = {ids: answer_logits(teacher, whole(teacher), ids, start, True) for ids, start in turns_of(found)}

    def formula(params):
        value = jnp.float32(0)
        for ids, start in turns_of(found):
            ours = answer_logits(module, params, ids, start, method == "full_ft")
            theirs = jnp.asarray(known[ids])
            nll = -jnp.take_along_axis(jax.nn.log_softmax(ours), jnp.asarray(ids[start:])[:, None], 1)
            value += 0.7 * 4.0 * dense_divergence(ours, theirs, top_k, 2.0).sum() + 0.3 * nll.sum()
        return value

    expected, wanted = dense_slopes(module, formula)
    assert total == pytest.approx(expected, rel=2e-5)
    assert_gradients_agree(slopes, wanted, 5e-5)
    assert float(tallies.terms) == float(tallies.tokens) == sum(sample.answer_len for sample in found)
    parts = tallies.metrics
    assert total == pytest.approx(0.7 * 4.0 * float(parts["kl"]) + 0.3 * float(parts["nll"]), rel=1e-5)


def test_all_tokens_as_best_are_all_tokens(worlds):
    """And fewer tokens give a smaller divergence, never less than 0."""
    world, batch = worlds["qwen3"], packed("two_stream", [samples(2)[:2], [], []])
    teacher, found = world.module("full", "full_ft"), {}
    for top_k in (None, 320, 20, 1):
        module = with_loss(world.module("lora"), Distillation(1.0, 1.5, top_k))
        found[top_k] = slopes_of(module, guide_of(module, teacher)(batch))
    assert found[320][0] == pytest.approx(found[None][0], rel=1e-5)
    assert_gradients_agree(found[320][2], found[None][2], 1e-4)
    assert 0 < found[1][0] < found[20][0] < found[None][0]


@pytest.mark.parametrize("top_k", [None, 7])
def test_a_module_that_is_its_teacher_has_nothing_to_learn(worlds, top_k):
    """On one KV the divergence and its gradient are 0; on the base's KV a module differs from itself on its own."""
    world, found = worlds["gemma3"], samples(3)[:3]
    same = with_loss(world.module("full", "full_ft"), Distillation(1.0, 1.0, top_k))
    total, _, slopes = slopes_of(same, guide_of(same, same)(packed("one_stream", [found, []])))
    tokens = sum(sample.answer_len for sample in found)
    assert abs(total) < 1e-5 * tokens
    plain = slopes_of(world.module("full", "full_ft"), packed("one_stream", [found, []]))[2]
    scale = max(float(jnp.abs(x).max()) for x in plain.values())
    assert max(float(jnp.abs(x).max()) for x in slopes.values()) < 1e-4 * scale
    shared = with_loss(world.module("full"), Distillation(1.0, 1.0, top_k))
    assert slopes_of(shared, guide_of(shared, shared)(packed("two_stream", [found, []])))[0] > 1e-3 * tokens
    # The base on its own KV is the base on the base's KV, in both layouts.
    base = with_loss(world.module("full"), Distillation(1.0, 1.0, top_k))
    base.trainable.clear()
    base.trainable.update(world.stacked(world.base.params))
    assert abs(slopes_of(base, guide_of(base, base)(packed("two_stream", [found, []])))[0]) < 1e-4 * tokens


@pytest.mark.parametrize(("kind", "_", "method", "family"), CASES)
def test_dpo_equals_the_formula(worlds, kind, _, method, family):
    """Equation 7 of the paper with torch, on the answers' log-probabilities, and their gradient through the module."""
    torch = pytest.importorskip("torch")
    # Of few pairs, since each answer is compiled: a packed row, one of them with a prompt of one token, and an empty one.
    world, found = worlds[family], pairs(4)[:2]
    module = with_loss(world.module(kind, method), Dpo(0.3))
    reference = fresh_of(world, method)
    batch = guide_of(module, reference)(packed(module.layout, [found, []]))
    total, tallies, slopes = slopes_of(module, batch)

    def sums(module, params):
        rows = []
        for sample in found:
            for start, answer in sample.answers:
                logits = answer_logits(module, params, (*sample.ids[:start], *answer), start, method == "full_ft")
                rows.append(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(answer)[:, None], 1).sum())
        return jnp.stack(rows).reshape(-1, 2)

    ours, theirs = sums(module, whole(module)), sums(reference, whole(reference))
    policy, initial = (torch.tensor(np.asarray(x)) for x in (ours, theirs))
    margin = 0.3 * ((policy[:, 0] - initial[:, 0]) - (policy[:, 1] - initial[:, 1]))
    assert total == pytest.approx(float(-torch.nn.functional.logsigmoid(margin).sum()), rel=2e-5)
    assert float(tallies.metrics["margin"]) == pytest.approx(float(margin.sum()), rel=1e-4)
    assert float(tallies.metrics["preferred"]) == int((margin > 0).sum())
    assert (float(tallies.terms), float(tallies.tokens)) == (2, sum(sample.answer_len for sample in found))

    def formula(params):
        gains = sums(module, params) - theirs
        return -jax.nn.log_sigmoid(0.3 * (gains[:, 0] - gains[:, 1])).sum()

    assert_gradients_agree(slopes, dense_slopes(module, formula)[1], 5e-5)


def fresh_of(world, method):
    """The base as a module."""
    module = world.module("full", method)
    return type(module)(**{**module.__dict__, "trainable": world.stacked(world.base.params)})


@pytest.mark.parametrize("method", ["prefillshare", "full_ft"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dpo_begins_at_log_2_with_the_servers_log_probabilities(worlds, kind, method):
    world, found = worlds["qwen3"], pairs(5)
    module = with_loss(world.module(kind, method), Dpo(0.1))
    guided = guide_of(module, module)(packed(module.layout, [[sample] for sample in found]))
    total, tallies, _ = slopes_of(module, guided)
    assert total == pytest.approx(3 * math.log(2), rel=1e-6)
    assert float(tallies.metrics["margin"]) == pytest.approx(0, abs=1e-4)
    if method == "full_ft":
        return
    numbers, signal = np.asarray(answer_numbers(guided.batch)), np.asarray(guided.signal)
    for row, sample in enumerate(found):
        for number, (start, answer) in enumerate(sample.answers, start=1):
            expected = ps.score(world.shared, kind, (*sample.ids[:start], *answer), response_start=start)[start:]
            np.testing.assert_allclose(signal[row][numbers[row] == number], np.array(expected, float), atol=1e-4)


@pytest.mark.parametrize(
    "loss", [Distillation(0.5, 1.0, None), Distillation(0.5, 1.0, 3), Dpo(0.1)], ids=["all", "best", "dpo"]
)
def test_the_logits_of_all_tokens_never_exist(worlds, loss):
    """No array of the compiled programs is as large as all logits."""
    world = worlds["qwen3"]
    module = with_loss(world.module("full"), loss)
    found = [[sample] for sample in pairs(1) * 4] if isinstance(loss, Dpo) else [[sample] for sample in samples(1) * 3]
    batch = packed("two_stream", found)
    guide = guide_of(module, module)
    guided, limit = guide(batch), batch.targets.size * 320
    step = jax.grad(lambda trainable: batch_loss(module.objective, trainable, *_fixed(module), guided, None)[0])
    read = guide_batch(batch, guide.objective)
    program: Any = guide.program
    texts = (
        str(jax.make_jaxpr(step)(module.trainable)),
        program.lower(guide.params, guide.base_params, read).as_text(),
    )
    assert "f32[11,320]" in texts[0]
    for text in texts:
        named = re.findall(r"(?:f32\[|tensor<)(\d[\dx,]*)", text)
        shapes = [tuple(map(int, re.findall(r"\d+", dims))) for dims in named]
        assert not [shape for shape in shapes if 320 in shape and math.prod(shape) >= limit]
