"""Stacked layers: every pattern of layers is covered once, in order, and stacks hold the layers' arrays."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_config

import pshare_jax as ps
from pshare_jax.model.config import LayerConfig, ModelConfig
from pshare_jax.model.layer_stack import (
    member_paths,
    over_layers,
    runs_of,
    stack_layers,
    stacked_shapes,
    unstack_layers,
)
from pshare_jax.model.rope import RopeConfig


def layers(windows):
    return tuple(LayerConfig(window or None, RopeConfig(theta=1e4)) for window in windows)


def config_of(windows):
    return replace(ModelConfig.from_hf(tiny_config("gemma3")), layers=layers(windows))


def stack_numbers(config):
    """Path of a stack of "x" -> the numbers of its layers."""
    runs = runs_of(config.layers)
    return {f"{run.prefix(place)}x": run.numbers(place) for run in runs for place in range(run.period)}


GEMMA = [8, 8, 8, 8, 8, 0]


@pytest.mark.parametrize(
    ("windows", "runs"),
    [
        ([0] * 30, [(0, 1, 30)]),
        (GEMMA * 4 + [8, 8], [(0, 6, 4), (24, 1, 2)]),
        ([0] * 20 + [8] * 8, [(0, 1, 20), (20, 1, 8)]),
        ([8, 0] * 5, [(0, 2, 5)]),
        ([0], [(0, 1, 1)]),
    ],
)
def test_real_patterns(windows, runs):
    assert [tuple(run) for run in runs_of(layers(windows))] == runs


@given(st.lists(st.sampled_from([0, 8, 9]), min_size=1, max_size=20))
def test_runs_are_all_layers_in_order_and_equal_at_a_place(windows):
    config, numbers = layers(windows), []
    for run in runs_of(config):
        for repeat in range(run.repeats):
            for place in range(run.period):
                number = run.numbers(place)[repeat]
                assert config[number] == config[run.first + place]
                numbers.append(number)
    assert numbers == list(range(len(windows)))


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_hold_the_layers_arrays_and_come_apart_again(tiny_folders, family):
    base = ps.load(tiny_folders[family])
    left = dict(base.params)
    stacks = stack_layers(left, base.config, base.mesh)
    assert not left
    assert {path: x.shape for path, x in stacks.items()} == {
        path: x.shape for path, x in stacked_shapes(base.architecture.shapes, base.config).items()
    }
    for path, stack in stacks.items():
        members = member_paths(path)
        parts = [stack] if members == (path,) else list(stack)
        for member, part in zip(members, parts, strict=True):
            np.testing.assert_array_equal(part, base.params[member])
    again = unstack_layers(stacks, base.config, base.mesh)
    assert again.keys() == base.params.keys()
    assert all((again[path] == base.params[path]).all() for path in again)


def test_each_layer_gets_its_own_arrays_number_and_given_values():
    config = config_of(GEMMA * 2 + [8])
    stacks = {path: jnp.array(numbers, jnp.float32) for path, numbers in stack_numbers(config).items()}

    def first(place, weights, carry, _):
        assert config.layers[place.like].window == (None if place.like % 6 == 5 else 8)
        # In order: each layer's digit is appended.
        return carry * 13 + weights["x"], 100 + place.number

    carry, results = over_layers(config, stacks, first, jnp.float32(0))

    def second(place, weights, carry, mine):
        return carry + jnp.abs(mine - 100 - weights["x"]) + jnp.abs(place.number - weights["x"]), None

    wrong, _ = over_layers(config, stacks, second, jnp.float32(0), results)
    expected = 0.0
    for number in range(13):
        expected = expected * 13 + number
    assert float(carry) == pytest.approx(expected, rel=1e-6)
    assert float(wrong) == 0


def test_a_program_does_not_grow_with_the_number_of_layers():
    def lines(windows):
        config = config_of(windows)
        stacks = {path: jnp.zeros((len(numbers), 4, 4)) for path, numbers in stack_numbers(config).items()}

        def step(place, weights, x, _):
            return jnp.tanh(x @ weights["x"]), None

        def fold(stacks):
            return over_layers(config, stacks, step, jnp.ones((4, 4)))[0].sum()

        return len(jax.jit(jax.grad(fold)).lower(stacks).as_text().splitlines())

    assert lines(GEMMA * 2) == lines(GEMMA * 8)
