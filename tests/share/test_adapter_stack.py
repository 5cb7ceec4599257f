"""Adapters of different rank, targets and scale in one stack: what a slot holds, when it is written, when the stack grows."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_adapter_module, tiny_folder

import pshare_jax as ps
from pshare_jax.model import adapters
from pshare_jax.model.adapters import LoraStack, stacked_product
from pshare_jax.model.architecture import is_stacked
from pshare_jax.model.layers import LoraConfig
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.server.compile_counter import count_compilations
from pshare_jax.share.adapter_stack import AdapterStack

SMALL, WIDE = LoraConfig(2, 0.5, ("q", "down")), LoraConfig(5, 3.0, ("v", "down", "o"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return ps.load(tiny_folder("llama", tmp_path_factory.mktemp("base"), num_hidden_layers=2))


def placed(stack: AdapterStack, used=(), **modules):
    return stack.publish(stack.place(modules, used))


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (3, 1), (8, 1), (2, 5)])
@pytest.mark.parametrize("num_slots", [1, 4])
def test_both_forms_give_every_row_its_own_adapter(rows, tokens, num_slots, monkeypatch):
    draw = np.random.default_rng(0)
    x = draw.standard_normal((rows, tokens, 6))
    a, b = draw.standard_normal((num_slots, 3, 6)), draw.standard_normal((num_slots, 3, 7))
    slots = np.arange(rows) % (num_slots + 1)
    for gather in (False, True):
        monkeypatch.setattr(adapters, "gathers", lambda *sizes, gather=gather: gather)
        given, stack_a, stack_b = (jnp.asarray(one, jnp.float32) for one in (x, a, b))
        made = np.asarray(stacked_product(given, stack_a, stack_b, jnp.asarray(slots)))
        for row, slot in enumerate(slots):
            if slot:
                np.testing.assert_allclose(made[row], x[row] @ a[slot - 1].T @ b[slot - 1], rtol=1e-5, atol=1e-5)
            else:
                assert not made[row].any()


def test_a_stack_has_the_union_of_targets_and_powers_of_two(base):
    stack = AdapterStack(base)
    modules = placed(
        stack,
        chat=random_adapter_module(base, SMALL, 1),
        base=base_module(base),
        math=random_adapter_module(base, WIDE, 2),
    )
    assert stack.weights.architecture.build.stack == LoraStack(2, 8, ("down", "o", "q", "v"))
    assert [modules[name].slot for name in ("base", "chat", "math")] == [0, 1, 2]
    assert all(module.group is stack and module.params is stack.weights.params for module in modules.values())
    assert all(stack.weights.params[path] is array for path, array in base.params.items())
    shapes = {path: shape for path, shape in stack.weights.architecture.shapes.items() if is_stacked(path)}
    assert shapes.keys() == {path for path in stack.weights.params if is_stacked(path)}
    for path, shape in shapes.items():
        array = stack.weights.params[path]
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


def test_a_slot_holds_the_scaled_adapter_and_zeros_also_after_a_larger_one(base):
    stack, small, wide = AdapterStack(base), random_adapter_module(base, SMALL, 1), random_adapter_module(base, WIDE, 2)
    placed(stack, x=wide)
    placed(stack, x=small)
    params = stack.weights.params
    assert stack.weights.architecture.build.stack == LoraStack(1, 8, ("down", "o", "q", "v"))
    q, down = "layers.1.attention.q", "layers.0.mlp.down"
    for name in (q, down):
        np.testing.assert_array_equal(params[f"{name}.stack_a"][0, :2], np.asarray(small.params[f"{name}.lora_a"]).T)
        np.testing.assert_array_equal(
            params[f"{name}.stack_b"][0, :2], 0.5 * np.asarray(small.params[f"{name}.lora_b"])
        )
        assert not np.asarray(params[f"{name}.stack_a"])[0, 2:].any()
        assert not np.asarray(params[f"{name}.stack_b"])[0, 2:].any()
    assert not np.asarray(params["layers.0.attention.v.stack_b"]).any()


def test_what_fits_compiles_nothing_and_what_runs_keeps_its_arrays(base):
    stack = AdapterStack(base)
    modules = placed(stack, a=random_adapter_module(base, WIDE, 1), b=random_adapter_module(base, SMALL, 2))
    old = stack.weights
    kept = {path: np.asarray(array) for path, array in old.params.items()}
    new, before = random_adapter_module(base, LoraConfig(3, 1.0, ("o",)), 3), count_compilations().count
    c = placed(stack, [modules["a"]], c=new)["c"]
    assert count_compilations().count == before
    # The slot of `b`, which no module in use names.
    assert c.slot == modules["b"].slot == 2
    assert stack.weights.architecture is old.architecture
    assert stack.weights.paged is old.paged
    assert all((np.asarray(array) == kept[path]).all() for path, array in old.params.items())
    first = "layers.0.attention.v.stack_a"
    assert (np.asarray(stack.weights.params[first])[0] == kept[first][0]).all()


def test_a_stack_grows_for_one_adapter_too_many_a_larger_rank_and_a_new_target(base):
    stack = AdapterStack(base)
    one = placed(stack, one=random_adapter_module(base, SMALL, 1))
    path = "layers.0.attention.q.stack_a"
    before = np.asarray(stack.weights.params[path])
    shapes = []
    used = [*one.values()]
    for seed, lora in enumerate([SMALL, LoraConfig(9, 1.0, ("q",)), LoraConfig(1, 1.0, ("gate",))], 2):
        used += placed(stack, used, new=random_adapter_module(base, lora, seed)).values()
        shapes.append(stack.weights.architecture.build.stack)
        np.testing.assert_array_equal(np.asarray(stack.weights.params[path])[0, :2], before[0])
    both = ("down", "q")
    assert shapes == [LoraStack(2, 2, both), LoraStack(4, 16, both), LoraStack(4, 16, ("down", "gate", "q"))]
    assert [module.slot for module in used] == [1, 2, 3, 4]


def test_full_modules_are_no_part_of_a_stack_and_without_adapters_nothing_changes(base):
    stack = AdapterStack(base)
    full = ps.DecodeModule(base.architecture, {path: array + 1 for path, array in base.params.items()}, base.mesh)
    modules = placed(stack, chat=base_module(base), full=full)
    assert modules["full"] is full
    assert stack.weights.architecture is base.architecture
    assert stack.weights.paged is base.paged
    assert stack.weights.params == base.params


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_that_is_not_finite_is_refused(base, value):
    stack, module = AdapterStack(base), random_adapter_module(base, SMALL, 1)
    path = "layers.1.mlp.down.lora_b"
    module.params[path] = module.params[path].at[0, 3].set(value)
    with pytest.raises(
        ps.PshareError, match=r"adapter of math has values that are not finite .* in layers.1.mlp.down;"
    ):
        stack.place({"math": module})
    assert stack.weights.architecture is base.architecture


def test_stacks_are_sharded_like_their_projections(base):
    two = base.on(ps.make_mesh([2, 3]))
    stack = AdapterStack(two)
    module = random_adapter_module(two, WIDE, 1)
    placed(stack, a=module)
    placed(stack, a=module)
    for path, array in stack.weights.params.items():
        assert array.sharding == parameter_sharding(path, two.config, two.mesh), path
        if path.endswith(("v.stack_b", "o.stack_a", "down.stack_a")):
            assert array.addressable_shards[0].data.nbytes * 2 == array.nbytes


def base_module(base: ps.Model) -> ps.DecodeModule:
    return ps.DecodeModule(base.architecture, base.params, base.mesh)
