"""Models with random weights, made on their device in their dtype; nothing is read and no weight passes through the host."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from benchmarks.device.sizes import PAGE, RANK, TARGETS
from pshare_jax.engine.config import attention_form
from pshare_jax.model.adapters import LoraStack
from pshare_jax.model.architecture import Architecture, Params, is_lora, is_stacked
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.kv.pages import KVPages
from pshare_jax.model.layers import Build, LoraConfig
from pshare_jax.model.quantization import is_scale
from pshare_jax.model.sharding import pages_sharding, parameter_sharding
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.model import Model, Weights
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.weights.load import Tensors

ADAPTER_SPREAD = 0.01
"""Standard deviation of adapters' weights: they change every number, and overflow none."""
INTEGER_SPREAD = 30.0
"""Standard deviation of 8-bit weights, whose largest are near 127 then."""


class Silent:
    """A detokenizer of answers without text."""

    def push(self, token_id: int) -> str:
        """No text."""
        return ""

    def flush(self) -> str:
        """No text."""
        return ""


class NoText(Tokenizer):
    """A tokenizer without a vocabulary: prompts are ids, and answers have no text."""

    def __init__(self) -> None:
        pass

    def detokenizer(self) -> Silent:
        """For one answer."""
        return Silent()


def random_model(
    config: ModelConfig, mesh: Mesh, dtype: str, seed: int = 0, weights: Literal["int8"] | None = None
) -> Model:
    """A model without tokenizer and end tokens, with the form of attention that the engine takes on this platform."""
    form = attention_form("auto", mesh.devices.flat[0].platform)
    architecture = Architecture(config, Build(dtype, weights, attention=form))
    params = _drawn(architecture, mesh, architecture.shapes, seed)
    tensors = Tensors()
    # The engine finds a base's arrays on a mesh by their hashes.
    tensors.update({(path, path): array for path, array in params.items()})
    return Model(architecture, params, mesh, NoText(), frozenset(), "random", {}, tensors=tensors)


def random_adapter(model: Model, seed: int) -> DecodeModule:
    """A decode module with a random LoRA adapter."""
    architecture = model.architecture.with_lora(LoraConfig(RANK, 1.0, TARGETS))
    own = {path: like for path, like in architecture.shapes.items() if is_lora(path)}
    return DecodeModule(architecture, {**model.params, **_drawn(architecture, model.mesh, own, seed)}, model.mesh)


def with_adapters(model: Model, count: int) -> Weights:
    """The model with `count` random adapters, stacked as the engine stacks them."""
    architecture = model.architecture.with_stack(LoraStack(count, RANK, TARGETS))
    own = {path: like for path, like in architecture.shapes.items() if is_stacked(path)}
    return Weights(architecture, {**model.params, **_drawn(architecture, model.mesh, own, 1)}, model.mesh)


class RandomPool:
    """Pages of random keys and values, which steps take and give back."""

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: str, num_pages: int):
        self.num_pages = num_pages
        self._config, self._mesh, self._dtype = config, mesh, dtype
        self.pages: KVPages = self._made()

    def run(self, step: Callable[..., tuple[Any, KVPages]], *arguments: Any) -> Any:
        """Calls `step(*arguments, pages)`, keeps the pages that it returns and gives back its other result."""
        if any(array.is_deleted() for array in jax.tree.leaves(self.pages)):
            # A step before has failed.
            self.pages = self._made()
        result, self.pages = step(*arguments, self.pages)
        return result

    def _made(self) -> KVPages:
        self.pages = ()
        config = self._config
        shape = (config.num_kv_heads, self.num_pages, PAGE, config.head_dim)
        draw = _draw(shape, self._dtype, pages_sharding(config, self._mesh))
        return tuple((draw(2 * layer, 1.0), draw(2 * layer + 1, 1.0)) for layer in range(config.num_layers))


def _drawn(architecture: Architecture, mesh: Mesh, shapes: Any, seed: int) -> Params:
    params = {}
    for number, (path, like) in enumerate(shapes.items()):
        sharding = parameter_sharding(path, architecture.config, mesh)
        if path.endswith("norm.weight"):
            params[path] = jnp.ones(like.shape, like.dtype, device=sharding)
            continue
        # Outputs are about as large as inputs, as in a trained model.
        spread = ADAPTER_SPREAD if is_lora(path) or is_stacked(path) else architecture.config.hidden_size**-0.5
        if is_scale(path):
            params[path] = jnp.full(like.shape, spread / INTEGER_SPREAD, like.dtype, device=sharding)
            continue
        if like.dtype == jnp.int8:
            spread = INTEGER_SPREAD
        params[path] = _draw(like.shape, str(like.dtype), sharding)(1_000_003 * seed + number, spread)
    return jax.block_until_ready(params)


@functools.cache
def _draw(shape: tuple[int, ...], dtype: str, sharding: NamedSharding) -> Any:
    """(seed, spread) -> normal numbers; one program for arrays of one shape."""

    def draw(seed: Any, spread: Any) -> jax.Array:
        wide = "float32" if dtype == "int8" else dtype
        return (jax.random.normal(jax.random.key(seed), shape, wide) * spread).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
