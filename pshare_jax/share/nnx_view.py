"""The split model as NNX modules, for notebooks and for training with NNX's own transforms.

The views hold no copies: every array of the base is one `BaseParam`, to which the prefill view and all decode views refer.
`factorize` and the engine compute with the same arrays, but need no NNX state.

Compile calls by `nnx.jit(..., graph_updates=False)`: the default returns all variables from the program, as copies. In a
gradient the base's KV is an input, computed before.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pshare_jax.errors import PshareError
from pshare_jax.mesh import same_devices
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.attention.dense import cached_attend, fresh_attend
from pshare_jax.model.decoder import Decoder
from pshare_jax.model.dense_steps import KVLayers, positions
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.model import Model


class BaseParam(nnx.Param):
    """A parameter of the base, which all views share and no task may train."""


TRAINABLE = nnx.All(nnx.Param, nnx.Not(BaseParam))
"""Filter of the parameters that belong to a task alone, for `nnx.DiffState`, `nnx.Optimizer(wrt=...)` and `nnx.state`."""


class PrefillView(nnx.Module):
    """The base, which turns tokens into KV."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def __call__(
        self, tokens: Int[Array, "B T"], start: Int[Array, ""] | int = 0, kv: KVLayers | None = None
    ) -> KVLayers:
        """The KV of tokens from the absolute position `start`, written into `kv`, which has room for them, or into new arrays
        with T slots.
        """
        config = self.decoder.config
        if kv is None:
            return self.decoder.prefill(tokens, positions(tokens, start), fresh_attend(config), ())
        return self.decoder.prefill(tokens, positions(tokens, start), cached_attend(config, jnp.asarray(start)), kv)


class DecodeView(nnx.Module):
    """A task's decode module, which reads KV. `TRAINABLE` selects what it does not share with the base.

    An activated LoRA acts on all tokens here; the base's own view computes those before its invocation.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    def __call__(
        self, tokens: Int[Array, "B T"], start: Int[Array, ""] | int, kv: KVLayers
    ) -> tuple[Float[Array, "B T V"], KVLayers]:
        """The logits of tokens from the absolute position `start`, and `kv` with theirs, for which it has room."""
        attend = cached_attend(self.decoder.config, jnp.asarray(start))
        hidden, kv = self.decoder(tokens, positions(tokens, start), attend, kv)
        return self.decoder.logits(hidden), kv


class SharedView(nnx.Module):
    """One prefill view and the tasks' decode views; `nnx.state` of it has every array of the base once."""

    def __init__(self, prefill: PrefillView, tasks: Mapping[str, DecodeView]):
        self.prefill = prefill
        self.tasks = nnx.Dict(dict(tasks))


def nnx_view(base: Model, modules: Mapping[str, DecodeModule]) -> SharedView:
    """The base and its decode modules on one mesh as NNX modules.

    Of a full module, the parameters that are the base's own arrays are shared too; a module that shall train all of its weights
    needs arrays of its own for each.

    Raises:
        PshareError: a module is on other devices than the base.
    """
    shared = {path: BaseParam(array) for path, array in base.params.items()}
    tasks = {}
    for task, module in modules.items():
        if not same_devices(module.mesh, base.mesh):
            raise PshareError(f"the task '{task}' is not on the devices of the base; load its module on that mesh.")
        variables = {
            path: shared[path] if array is base.params.get(path) else _own(path, array)
            for path, array in module.params.items()
        }
        tasks[task] = DecodeView(module.architecture.holding(variables))
    return SharedView(PrefillView(base.architecture.holding(shared)), tasks)


def _own(path: str, array: jax.Array) -> nnx.Param:
    return nnx.LoRAParam(array) if is_lora(path) else nnx.Param(array)
