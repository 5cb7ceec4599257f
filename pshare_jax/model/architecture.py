"""Parameters as a flat dict, path -> array ("layers.0.attention.q.kernel"), and their binding to the NNX decoder.

Loading, sharding, hashing, saving and training all use that dict; `Architecture.bind` turns it into a `Decoder` inside
a jitted function.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pshare_jax.model.adapters import LoraStack
from pshare_jax.model.config import LayerConfig, ModelConfig
from pshare_jax.model.decoder import Decoder, DecoderLayer, prefill_reads
from pshare_jax.model.layers import Build, LoraConfig, Projection
from pshare_jax.model.paged_batch import AttentionForm
from pshare_jax.model.quantization import WeightForm

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class Architecture:
    """A decoder without its weights."""

    config: ModelConfig
    build: Build = Build()

    @property
    def dtype(self) -> str:
        """The parameters' dtype, except that of quantised kernels and their scales."""
        return self.build.dtype

    @property
    def weights(self) -> WeightForm | None:
        """The form of quantised kernels; None if kernels are not quantised."""
        return self.build.weights

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter's shape, if the decoder has an adapter."""
        return self.build.lora

    def with_lora(self, lora: LoraConfig) -> "Architecture":
        """The same decoder with an adapter."""
        return replace(self, build=replace(self.build, lora=lora))

    def with_dtype(self, dtype: str) -> "Architecture":
        """The same decoder with parameters of another dtype."""
        return replace(self, build=replace(self.build, dtype=dtype))

    def with_weights(self, weights: WeightForm | None) -> "Architecture":
        """The same decoder with kernels in this form."""
        return replace(self, build=replace(self.build, weights=weights))

    def with_stack(self, stack: LoraStack | None) -> "Architecture":
        """The same decoder with stacked adapters."""
        return replace(self, build=replace(self.build, stack=stack))

    def with_attention(self, form: AttentionForm) -> "Architecture":
        """The same decoder with another form of attention over pages."""
        return self if form == self.build.attention else replace(self, build=replace(self.build, attention=form))

    def summing_in(self, parts: int) -> "Architecture":
        """The same decoder with its inner products summed in parts (`Build.sum_parts`)."""
        return replace(self, build=replace(self.build, sum_parts=parts))

    @functools.cached_property
    def _skeleton(self) -> tuple[nnx.GraphDef, list]:
        decoder = nnx.eval_shape(lambda: Decoder(self.config, self.build))
        graph, state = nnx.split(decoder)
        return graph, list(nnx.to_flat_state(state))

    @functools.cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and dtype of every parameter."""
        return {_path(keys): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for keys, leaf in self._skeleton[1]}

    @property
    def without_layers(self) -> "Architecture":
        """The same decoder with embedding, final norm and head alone."""
        return replace(self, config=replace(self.config, layers=()))

    def bind_layer(self, layer: int, params: Mapping[str, jax.Array]) -> DecoderLayer:
        """The decoder's layer with these parameters ("attention.q.kernel"), as `bind`."""
        graph, leaves = _layer_skeleton(self.config, self.config.layers[layer], self.build)
        return nnx.merge(graph, nnx.from_flat_state([(keys, x.replace(params[_path(keys)])) for keys, x in leaves]))

    def bind(self, params: Mapping[str, jax.Array], slots: Any = None) -> Decoder:
        """The decoder with these parameters, without a copy; for use inside a traced function. Where a parameter is missing
        that prefill does not read, only `prefill` can be used.

        Stacked adapters need `slots`, int `[B]`: the slot of each row's adapter.
        """
        graph, leaves = self._skeleton
        given = [(keys, leaf, _path(keys)) for keys, leaf in leaves]
        skipped = {path for *_, path in given if path not in params and not prefill_reads(path, self.config)}
        filled = [(keys, leaf if path in skipped else leaf.replace(params[path])) for keys, leaf, path in given]
        decoder = nnx.merge(graph, nnx.from_flat_state(filled))
        if self.build.stack is not None and slots is not None:
            _set_slots(decoder, jnp.asarray(slots))
        return decoder

    def holding(self, variables: Mapping[str, nnx.Variable]) -> Decoder:
        """The decoder that holds these variables themselves, by path; decoders may have variables in common."""
        graph, leaves = self._skeleton
        return nnx.merge(graph, nnx.from_flat_state([(keys, variables[_path(keys)]) for keys, _ in leaves]))


@functools.cache
def _layer_skeleton(config: ModelConfig, layer: LayerConfig, build: Build) -> tuple[nnx.GraphDef, list]:
    graph, state = nnx.split(nnx.eval_shape(lambda: DecoderLayer(config, layer, build)))
    return graph, list(nnx.to_flat_state(state))


def _set_slots(decoder: Decoder, slots: jax.Array) -> None:
    for _, node in nnx.iter_modules(decoder):
        if isinstance(node, Projection) and node.stack_a is not None:
            node.slots = slots


def is_stacked(path: str) -> bool:
    """Whether a parameter holds stacked adapters."""
    return path.endswith((".stack_a", ".stack_b"))


def is_lora(path: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter."""
    return path.endswith((".lora_a", ".lora_b"))


def nbytes(params: Params) -> int:
    """Bytes of all parameters; replicas on a mesh count once."""
    return sum(array.nbytes for array in params.values())


def _path(keys: tuple) -> str:
    return ".".join(map(str, keys))
