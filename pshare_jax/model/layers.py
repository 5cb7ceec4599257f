"""The parts of a decoder layer: RMSNorm, projections with optional LoRA, attention's projections and the MLP.

Modules are created with zeros under `nnx.eval_shape`, which allocates nothing; `Architecture` binds their parameters.
Kernels are `[in, out]`, the faster order for prefill on CPU. Modules are pure functions of parameters and inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pshare_jax.model.adapters import LoraStack, stacked_product
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.paged_batch import AttentionForm
from pshare_jax.model.quantization import WeightForm


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter's shape: `rank`, the factor `scale` on B A x (alpha / rank), and the projections that have it."""

    rank: int
    scale: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Build:
    """The options of a decoder besides its config: parameter dtype, form of quantised kernels (None: not quantised), LoRA, the
    number of parts of inner products, and the form of attention over pages (model/paged_steps.py).

    LoRA is one adapter (`lora`: training, the plain loop) or a stack of them (`stack`: the engine), never both.

    For one row, XLA on CPU adds all terms in order on one core. Sums in 2 parts use two cores (a decode step's products
    take 0.8x the time); sums in 16 parts halve the rounding error of real models.
    """

    dtype: str = "float32"
    weights: WeightForm | None = None
    lora: LoraConfig | None = None
    stack: LoraStack | None = None
    sum_parts: int = 1
    attention: AttentionForm = "xla"


class Projection(nnx.Module):
    """y = x W (+ b) (+ scale * x A B): W `[in, out]`, A `[in, rank]`, B `[rank, out]` (arXiv 2106.09685, eq. 3).

    A quantised W is the kernel times its scale `[1, out]` (model/quantization.py); the scale multiplies the product, so that the
    kernel is read in eight bits. With stacked adapters A and B are those of each row's slot (model/adapters.py), and their scale
    is part of B.
    """

    def __init__(self, name: str, num_in: int, num_out: int, *, bias: bool, build: Build):
        lora = build.lora if build.lora and name in build.lora.targets else None
        self.kernel = nnx.Param(jnp.zeros((num_in, num_out), build.weights or build.dtype))
        self.kernel_scale = nnx.Param(jnp.zeros((1, num_out), jnp.float32)) if build.weights else None
        self.bias = nnx.Param(jnp.zeros((num_out,), build.dtype)) if bias else None
        self.lora_a = nnx.LoRAParam(jnp.zeros((num_in, lora.rank), build.dtype)) if lora else None
        self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, num_out), build.dtype)) if lora else None
        self.scale = lora.scale if lora else 0.0
        stack = build.stack if build.stack and name in build.stack.targets else None
        self.stack_a = nnx.Param(jnp.zeros((stack.slots, stack.rank, num_in), build.dtype)) if stack else None
        self.stack_b = nnx.Param(jnp.zeros((stack.slots, stack.rank, num_out), build.dtype)) if stack else None
        self.slots: Int[Array, "B"] | None = None
        self.sum_parts = build.sum_parts
        self.drop: Callable[[Array], Array] | None = None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        """Project the last axis. Training may set `drop` to a dropout of the adapter's inputs; `Architecture.bind` sets the
        rows' `slots`.
        """
        if self.kernel_scale is None:
            y = product_in_parts(x, self.kernel[...], self.sum_parts)
        else:
            y = product_in_parts(x, self.kernel[...].astype(x.dtype), self.sum_parts)
            y = (y * self.kernel_scale[...]).astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...]
        if self.lora_a is not None and self.lora_b is not None:
            low_rank = jnp.einsum("BTI,IR->BTR", x if self.drop is None else self.drop(x), self.lora_a[...])
            y = y + self.scale * jnp.einsum("BTR,RO->BTO", low_rank, self.lora_b[...])
        if self.stack_a is not None and self.stack_b is not None:
            assert self.slots is not None, "stacked adapters need the rows' slots"
            y = y + stacked_product(x, self.stack_a[...], self.stack_b[...], self.slots)
        return y


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, computed in float32 (Gemma: weight + 1, cast last)."""

    def __init__(self, size: int, *, eps: float, plus_one: bool, dtype: str):
        self.weight = nnx.Param(jnp.zeros((size,), dtype))
        self.eps, self.plus_one = eps, plus_one

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.plus_one:
            return (normed * (1.0 + self.weight[...].astype(jnp.float32))).astype(x.dtype)
        return self.weight[...] * normed.astype(x.dtype)


class AttentionProjections(nnx.Module):
    """q, k, v and output projections, with optional per-head q/k norms before the rotation (Qwen3, Gemma 3)."""

    def __init__(self, config: ModelConfig, build: Build):
        size, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Projection("q", size, heads, bias=bias, build=build)
        self.k = Projection("k", size, kv_heads, bias=bias, build=build)
        self.v = Projection("v", size, kv_heads, bias=bias, build=build)
        self.o = Projection("o", heads, size, bias=bias, build=build)
        self.head_dim = config.head_dim
        self.q_norm = norm(config, config.head_dim, build) if config.qk_norm else None
        self.k_norm = norm(config, config.head_dim, build) if config.qk_norm else None

    def query(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries, normalised, before rotation."""
        return self._heads(self.q(x), self.q_norm)

    def key(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K H"]:
        """Keys, normalised, before rotation."""
        return self._heads(self.k(x), self.k_norm)

    def value(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K H"]:
        """Values."""
        return self._heads(self.v(x), None)

    def output(self, heads: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        """Concatenate the heads and project them back."""
        return self.o(heads.reshape(*heads.shape[:2], -1))

    def _heads(self, x: Array, normed: RMSNorm | None) -> Array:
        x = x.reshape(*x.shape[:2], -1, self.head_dim)
        return x if normed is None else normed(x)


class MLP(nnx.Module):
    """Gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, build: Build):
        size, ffn, bias = config.hidden_size, config.ffn_size, config.mlp_bias
        self.gate = Projection("gate", size, ffn, bias=bias, build=build)
        self.up = Projection("up", size, ffn, bias=bias, build=build)
        self.down = Projection("down", ffn, size, bias=bias, build=build)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Apply the MLP to every position."""
        return self.down(activation(self.activation)(self.gate(x)) * self.up(x))


def norm(config: ModelConfig, size: int, build: Build) -> RMSNorm:
    """The family's RMSNorm over `size` channels."""
    return RMSNorm(size, eps=config.norm_eps, plus_one=config.norm_plus_one, dtype=build.dtype)


def product_in_parts(x: Float[Array, "B T I"], kernel: Float[Array, "I O"], parts: int) -> Float[Array, "B T O"]:
    """x times kernel, with the inner sum computed in `parts` equal parts, which are then added."""
    if parts == 1:
        return jnp.einsum("BTI,IO->BTO", x, kernel)
    missing = -kernel.shape[0] % parts
    x, kernel = jnp.pad(x, ((0, 0), (0, 0), (0, missing))), jnp.pad(kernel, ((0, missing), (0, 0)))
    x, kernel = x.reshape(*x.shape[:2], parts, -1), kernel.reshape(parts, -1, kernel.shape[1])
    return jnp.einsum("BTCI,CIO->CBTO", x, kernel).sum(axis=0)


def activation(name: str) -> Callable[[Array], Array]:
    """The activation function with this name in config.json."""
    return {
        "silu": jax.nn.silu,
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    }[name]


def soft_cap(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap), or x without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
