"""All LoRA adapters of one mesh, stacked beside the base's parameters, so that their tasks share steps and programs.

A stack grows in powers of two; while an adapter fits, placing it writes a slot and compiles nothing. The engine's
builder and the server's task loader place modules, one after another; workers read `weights`. A slot is free as soon as no
module in use names it, so nothing counts references.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pshare_jax.errors import PshareError
from pshare_jax.model.adapters import LoraStack
from pshare_jax.model.architecture import Architecture, Params, is_stacked
from pshare_jax.model.paged_steps import PagedSteps
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.share.boundary import Boundary
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.mesh_base import MeshBase
from pshare_jax.share.model import Model, Weights
from pshare_jax.text.chat_style import ChatStyle


class MeshStack:
    """The adapter stack of a mesh, with the base: as long as a module uses it. The engine's builder and the task loader place
    modules here.
    """

    def __init__(self, base: MeshBase):
        self._base = base
        self._stack: Callable[[], AdapterStack | None] = lambda: None

    def place(self, modules: Mapping[str, DecodeModule], used: Iterable[Any] = ()) -> "Placed":
        """As `AdapterStack.place`; full modules alone bring no base."""
        if not any(module.architecture.lora or self._base.is_base(module) for module in modules.values()):
            return Placed(None, modules)
        stack = self._stack() or AdapterStack(self._base.model())
        placed = stack.place(modules, used)
        self._stack = weakref.ref(stack)
        return placed

    def publish(self, placed: "Placed") -> Mapping[str, Any]:
        """As `AdapterStack.publish`."""
        stack = self._stack()
        return placed.modules if placed.weights is None or stack is None else stack.publish(placed)


class AdapterStack:
    """The base of one mesh and its adapters; `weights` is replaced when an adapter is placed, and never changed."""

    def __init__(self, base: Model):
        self._base = base
        self.weights = Weights(base.architecture, base.params, base.mesh)
        """The base's weights, with all adapters once there are any."""

    def place(self, modules: Mapping[str, DecodeModule], used: Iterable[Any] = ()) -> "Placed":
        """The modules as tasks that share steps, and the weights that hold their adapters: in slots that no module in `used`
        (a task's or a live request's) has. Full modules stay as they are. Nothing changes until `publish`.

        Raises:
            PshareError: an adapter has values that are not finite; the sentence names it by its key.
        """
        adapters = {name: module for name, module in modules.items() if module.architecture.lora is not None}
        taken = {module.slot for module in used if module.group is self}
        free = (slot for slot in itertools.count(1) if slot not in taken)
        slots = {name: next(free) for name in adapters}
        weights = self._with_room(adapters.values(), max(slots.values(), default=0))
        params = dict(weights.params)
        for name, module in adapters.items():
            _write(params, slots[name], _values(name, module, weights.architecture), weights)
        stacked = {name: self._stacked(module, slots.get(name, 0)) for name, module in modules.items()}
        return Placed(Weights(weights.architecture, params, weights.mesh), stacked)

    def publish(self, placed: "Placed") -> Mapping[str, Any]:
        """Steps use the placed adapters' weights from now on; returns the placed modules."""
        assert placed.weights is not None
        self.weights = placed.weights
        return placed.modules

    def _stacked(self, module: DecodeModule, slot: int) -> "DecodeModule | StackedModule":
        if not slot and not self._is_base(module):
            return module
        return StackedModule(self, slot, module.style, module.boundary, module.base and StackedWeights(self, 0))

    def _is_base(self, module: DecodeModule) -> bool:
        same = module.architecture == self._base.architecture and len(module.params) == len(self._base.params)
        return same and all(module.params.get(path) is array for path, array in self._base.params.items())

    def _with_room(self, adapters: Collection[DecodeModule], most_slot: int) -> Weights:
        """The weights, with larger stacks if the adapters do not fit."""
        shapes = [module.architecture.lora for module in adapters if module.architecture.lora is not None]
        if not shapes:
            return self.weights
        now = self.weights.architecture.build.stack or LoraStack(1, 1, ())
        targets = {*now.targets, *(target for shape in shapes for target in shape.targets)}
        stack = LoraStack(
            power_of_two(max(now.slots, most_slot)),
            power_of_two(max(now.rank, *(shape.rank for shape in shapes))),
            tuple(sorted(targets)),
        )
        if stack == self.weights.architecture.build.stack:
            return self.weights
        architecture, mesh = self._base.architecture.with_stack(stack), self._base.mesh
        params = dict(self._base.params)
        for path, shape in architecture.shapes.items():
            if is_stacked(path):
                values, old = np.zeros(shape.shape, shape.dtype), self.weights.params.get(path)
                if old is not None:
                    values[tuple(map(slice, old.shape))] = np.asarray(old)
                params[path] = jax.device_put(values, parameter_sharding(path, architecture.config, mesh))
        return Weights(architecture, params, mesh)


@dataclass(frozen=True)
class StackedWeights:
    """The weights of one slot of a stack, as they are at the time of reading: slot 0 is the base's."""

    stack: AdapterStack
    slot: int

    @property
    def group(self) -> AdapterStack:
        """Rows of any slot may share a step."""
        return self.stack

    @property
    def current(self) -> Weights:
        """The weights of all slots; parameters and steps that belong together."""
        return self.stack.weights

    @property
    def architecture(self) -> Architecture:
        """The decoder with the stack's shape."""
        return self.current.architecture

    @property
    def params(self) -> Params:
        """The parameters of all slots."""
        return self.current.params

    @property
    def mesh(self) -> Mesh:
        """The stack's mesh."""
        return self.current.mesh

    @property
    def paged(self) -> PagedSteps:
        """The steps of all slots."""
        return self.current.paged


@dataclass(frozen=True)
class StackedModule(StackedWeights):
    """A decode module in a stack: a LoRA module, or in slot 0 the base (share/decode_module.py: `DecodeModule`)."""

    style: ChatStyle = ChatStyle()
    boundary: Boundary = Boundary()
    base: StackedWeights | None = None

    @property
    def encoder(self) -> StackedWeights:
        """The weights that encode its context when every task prefills for itself."""
        return self.base or self


@dataclass(frozen=True)
class Placed:
    """What `AdapterStack.place` has prepared: the stack's weights from now on (None: no stack), and the modules by name."""

    weights: Weights | None
    modules: Mapping[str, DecodeModule | StackedModule]

    def as_run(self, name: str) -> DecodeModule:
        """The architecture and parameters that the named module's steps will have."""
        module = self.modules[name]
        weights = self.weights if isinstance(module, StackedModule) else module
        assert weights is not None
        return DecodeModule(weights.architecture, weights.params, weights.mesh)


def power_of_two(least: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (least - 1).bit_length()


def _write(params: Params, slot: int, values: Mapping[str, np.ndarray], weights: Weights) -> None:
    """Puts an adapter into a slot; a step that runs still reads the old arrays, so they are not donated."""
    for path, value in values.items():
        sharding = parameter_sharding(path, weights.config, weights.mesh)
        params[path] = _writer(sharding)(params[path], value, np.int32(slot - 1))


@functools.cache
def _writer(sharding: NamedSharding) -> Any:
    return jax.jit(
        lambda stack, value, index: jax.lax.dynamic_update_index_in_dim(stack, value, index, 0), out_shardings=sharding
    )


def _values(name: str, module: DecodeModule, stacked: Architecture) -> dict[str, np.ndarray]:
    """What a slot of every stack holds for this adapter: A transposed, B times the scale, both padded with zeros.

    NaN or infinity would reach the rows of other adapters, as 0 times NaN.
    """
    lora = module.architecture.lora
    assert lora is not None
    values = {}
    for path, shape in stacked.shapes.items():
        if not is_stacked(path):
            continue
        values[path] = np.zeros(shape.shape[1:], shape.dtype)
        given = module.params.get(path.replace(".stack_", ".lora_"))
        if given is not None:
            matrix = np.asarray(given).astype(np.float32)
            matrix = matrix.T if path.endswith(".stack_a") else matrix * np.float32(lora.scale)
            values[path][: lora.rank] = matrix
            if not np.isfinite(values[path].astype(np.float32)).all():
                raise PshareError(
                    f"the adapter of {name} has values that are not finite (NaN or infinity) in {path.rsplit('.', 1)[0]}; "
                    "train or export it again."
                )
    return values
