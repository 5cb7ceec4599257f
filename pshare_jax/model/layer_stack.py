"""Layers as stacked arrays, over which training scans: its programs hold one copy of a layer, not one for each.

Layers of a repeating pattern (Gemma: five with a window, one without) form a run, with a stack for each place of the pattern:
"layers.5:24:6.mlp.up.kernel" is `[4, ...]`, the array of the layers 5, 11, 17 and 23, as in Python's slices. On disk and in
serving each layer has its own arrays.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from pshare_jax.model.architecture import Params
from pshare_jax.model.config import LayerConfig, ModelConfig
from pshare_jax.model.sharding import parameter_sharding

Carry = TypeVar("Carry")
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_STACK = re.compile(r"layers\.(\d+:\d+:\d+)\.(.+)")


class Run(NamedTuple):
    """`repeats` repetitions of a pattern of `period` layers, from layer `first` on."""

    first: int
    period: int
    repeats: int

    @property
    def stop(self) -> int:
        """The layer after the last."""
        return self.first + self.period * self.repeats

    def numbers(self, place: int) -> range:
        """The layers at a place of the pattern."""
        return range(self.first + place, self.stop, self.period)

    def prefix(self, place: int) -> str:
        """The beginning of the paths of their stacks."""
        return f"layers.{self.first + place}:{self.stop}:{self.period}."


@functools.cache
def runs_of(layers: tuple[LayerConfig, ...]) -> tuple[Run, ...]:
    """All layers as runs; each is the longest from its first layer on, and of such the one with the shortest pattern."""
    runs, first = [], 0
    while first < len(layers):
        found = [Run(first, period, _repeats(layers[first:], period)) for period in range(1, len(layers) - first + 1)]
        best = max(
            (run for run in found if run.period == 1 or run.repeats > 1), key=lambda run: (run.stop, -run.period)
        )
        runs.append(best)
        first = best.stop
    return tuple(runs)


def _repeats(layers: Sequence[LayerConfig], period: int) -> int:
    pattern, count = layers[:period], 1
    while layers[count * period : (count + 1) * period] == pattern:
        count += 1
    return count


# --- arrays ----------------------------------------------------------------------------------------------------------


def stack_layers(params: dict[str, Any], config: ModelConfig, mesh: Mesh) -> Params:
    """`params` (of JAX or NumPy), or a part of them that has an array for each layer, in stacks. Each array leaves
    `params` once it is stacked, so that all exist only once where nobody else holds them.
    """
    stacked = {}
    for path, members in stacked_paths(params, config).items():
        arrays = [params.pop(member) for member in members]
        sharding = stacked_sharding(path, config, mesh)
        stacked[path] = _stack(sharding)(arrays) if is_stack(path) else jax.device_put(arrays[0], sharding)
    return stacked


def unstack_layers(params: Mapping[str, Array], config: ModelConfig, mesh: Mesh) -> Params:
    """The arrays of each layer, from stacks."""
    layers = {}
    for path, array in params.items():
        members = member_paths(path)
        parts = _unstack(parameter_sharding(path, config, mesh), len(members))(array) if is_stack(path) else (array,)
        layers |= zip(members, parts, strict=True)
    return {path: layers[path] for path in sorted(layers, key=_layer_order)}


def stacked_shapes(shapes: Mapping[str, Any], config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the stacks of arrays of these shapes."""
    found = {}
    for path, members in stacked_paths(shapes, config).items():
        like = shapes[members[0]]
        shape = like.shape if members == (path,) else (len(members), *like.shape)
        found[path] = jax.ShapeDtypeStruct(shape, like.dtype)
    return found


def stacked_sharding(path: str, config: ModelConfig, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of an array or a stack: every device has its part of each layer."""
    sharding = parameter_sharding(path, config, mesh)
    return NamedSharding(mesh, PartitionSpec(None, *sharding.spec)) if is_stack(path) else sharding


def is_stack(path: str) -> bool:
    """Whether the path is one of a stack of layers' arrays."""
    return _STACK.fullmatch(path) is not None


def stacked_paths(paths: Mapping[str, Any], config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Path of a stack -> the paths of its layers' arrays; arrays outside layers are alone."""
    place_of = {
        n: run.prefix(place)
        for run in runs_of(config.layers)
        for place in range(run.period)
        for n in run.numbers(place)
    }
    stacks: dict[str, list[str]] = {}
    for path in sorted(paths, key=_layer_order):
        layer = _LAYER.fullmatch(path)
        stacks.setdefault(path if layer is None else place_of[int(layer[1])] + layer[2], []).append(path)
    return {path: tuple(members) for path, members in stacks.items()}


def member_paths(path: str) -> tuple[str, ...]:
    """The paths of the layers' arrays in a stack; of another array, its own."""
    stack = _STACK.fullmatch(path)
    if stack is None:
        return (path,)
    return tuple(f"layers.{number}.{stack[2]}" for number in range(*map(int, stack[1].split(":"))))


def _layer_order(path: str) -> tuple[int, str]:
    layer = _LAYER.fullmatch(path)
    return (-1 if layer is None else int(layer[1])), path


@functools.cache
def _stack(sharding: NamedSharding) -> Callable[[list[Array]], Array]:
    return jax.jit(jnp.stack, out_shardings=sharding)


@functools.cache
def _unstack(sharding: NamedSharding, count: int) -> Callable[[Array], tuple[Array, ...]]:
    return jax.jit(lambda stack: tuple(stack[index] for index in range(count)), out_shardings=sharding)


# --- the scan --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A layer in a scan: its number, known when the program runs, and all numbers that it can have, which have one config."""

    number: Int[Array, ""]
    numbers: range

    @property
    def like(self) -> int:
        """A layer with the same config."""
        return self.numbers[0]


Step = Callable[[Place, Params, Carry, Any], tuple[Carry, Any]]
"""step(place, the layer's parameters, carry, what is given for the layer) -> (carry, result)."""


def over_layers(
    config: ModelConfig, stacks: Params, step: Step[Carry], carry: Carry, given: tuple = ()
) -> tuple[Carry, tuple]:
    """Applies `step` to all layers in order. `given` are the results of another call, of which each layer gets its own.

    The results are stacked like the layers: for each run, for each place of its pattern.
    """
    results = []
    for index, run in enumerate(runs_of(config.layers)):
        weights = [_at(stacks, run.prefix(place)) for place in range(run.period)]
        theirs = given[index] if given else (None,) * run.period
        carry, result = _over_run(run, weights, step, carry, theirs)
        results.append(result)
    return carry, tuple(results)


def _over_run(run: Run, weights: list[Params], step: Step[Carry], carry: Carry, given: tuple) -> tuple[Carry, tuple]:
    def pattern(carry: Carry, xs: tuple) -> tuple[Carry, tuple]:
        repeat, weights, given = xs
        results = []
        for place in range(run.period):
            where = Place(run.first + repeat * run.period + place, run.numbers(place))
            carry, result = step(where, weights[place], carry, given[place])
            results.append(result)
        return carry, tuple(results)

    return jax.lax.scan(pattern, carry, (jnp.arange(run.repeats), weights, given))


def _at(stacks: Params, prefix: str) -> Params:
    return {path.removeprefix(prefix): x for path, x in stacks.items() if path.startswith(prefix)}
