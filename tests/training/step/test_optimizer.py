"""The optimizer and its schedule."""

from dataclasses import replace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pshare_jax.training.config import OptimizerConfig
from pshare_jax.training.step.optimizer import decayed, make_schedule, update_rule


def test_schedules():
    config = OptimizerConfig(learning_rate=2.0, warmup_ratio=0.2)
    for schedule, at in (
        ("linear", [2 / 3, 4 / 3, 2, 2 * 7 / 8, 2 / 8]),
        ("cosine", [2 / 3, 4 / 3, 2, 1 + np.cos(np.pi / 8), 1 + np.cos(7 * np.pi / 8)]),
        ("constant", [2 / 3, 4 / 3, 2, 2, 2]),
    ):
        rate = cast(Any, make_schedule(replace(config, schedule=schedule), 10))
        np.testing.assert_allclose([float(rate(step)) for step in (0, 1, 2, 3, 9)], at, rtol=1e-5)
    assert make_schedule(replace(config, warmup_steps=0), 10)(0) == 2
    # A warm-up longer than the run never reaches the peak.
    rate = cast(Any, make_schedule(replace(config, warmup_steps=99), 2))
    assert float(rate(1)) == pytest.approx(2 * 2 / 3)


def test_one_step_is_adamw_by_hand():
    """Clipping, then Adam's step, then decay of matrices only."""
    config = OptimizerConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        b1=0.8,
        b2=0.9,
        eps=1e-3,
        weight_decay=0.5,
        clip_norm=1.0,
    )
    params = {"layers.0.attention.q.kernel": jnp.array([[2.0, -1.0]]), "final_norm.weight": jnp.array([3.0])}
    gradients = {"layers.0.attention.q.kernel": jnp.array([[3.0, 0.0]]), "final_norm.weight": jnp.array([4.0])}
    rule = update_rule(config, 5)
    factor = rule.clip_factor(optax.tree.norm(gradients))
    clipped_gradients = {path: gradient * factor for path, gradient in gradients.items()}
    updates, _ = rule.transform.update(clipped_gradients, rule.transform.init(params), params)
    after: Any = optax.apply_updates(params, updates)
    for path, decay in (("layers.0.attention.q.kernel", 0.5), ("final_norm.weight", 0.0)):
        clipped = np.asarray(gradients[path]) / 5.0
        step = clipped / (np.abs(clipped) + 1e-3) + decay * np.asarray(params[path])
        np.testing.assert_allclose(after[path], np.asarray(params[path]) - 0.1 * step, rtol=1e-5)


def test_matrices_decay_and_norms_and_biases_do_not():
    paths = ["layers.1.attention.q.bias", "layers.1.attention.q_norm.weight", "layers.1.pre_mlp_norm.weight"]
    paths += [
        "embedding.weight",
        "head",
        "layers.1.mlp.down.lora_a",
        "layers.1.mlp.down.lora_b",
        "layers.1.mlp.up.kernel",
    ]
    assert list(decayed(dict.fromkeys(paths, jnp.zeros(1))).values()) == [False] * 3 + [True] * 5


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_a_stack_is_updated_as_its_layers_are(name):
    """Also by Adafactor, which keeps means of rows and columns and clips an update by its root mean square."""
    rule = update_rule(OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, schedule="constant"), 9)
    draw = np.random.default_rng(0)
    # Layers of very different scales; large enough to be factored.
    params, slopes = (draw.normal(size=(2, 3, 128, 160)) * [[[[1.0]], [[9.0]], [[0.1]]]]).astype(np.float32)

    def updated(split) -> Any:
        weights, gradients = split(params), split(slopes)
        return rule.transform.update(gradients, rule.transform.init(weights), weights)[0]

    (whole,) = updated(lambda values: {"layers.0:3:1.mlp.up.kernel": jnp.asarray(values)}).values()
    parts = updated(lambda values: {f"layers.{n}.mlp.up.kernel": jnp.asarray(values[n]) for n in range(3)})
    for number in range(3):
        # Absolute, where step and decay nearly cancel.
        np.testing.assert_allclose(whole[number], parts[f"layers.{number}.mlp.up.kernel"], rtol=1e-5, atol=1e-6)
