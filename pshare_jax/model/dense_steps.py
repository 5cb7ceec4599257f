"""The jitted steps of one architecture on one mesh over dense KV: plain forward pass, prefill, decode.

They are pure functions of (params, tokens, start, kv), called through `share.model.Weights`. Callers pad tokens and KV
to buckets, so that few shapes are compiled. Results have the shardings of model/sharding.py.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pshare_jax.mesh import replicated
from pshare_jax.model.architecture import Architecture, Params
from pshare_jax.model.attention.dense import cached_attend, fresh_attend
from pshare_jax.model.kv.dense import LayerKV
from pshare_jax.model.sharding import kv_sharding

KVLayers = tuple[LayerKV, ...]
Tokens = Int[Array, "B T"] | Int[np.ndarray, "B T"]
EXACT_PARTS = 16
"""Parts of inner products in the plain forward pass, which is compared with other implementations."""
ONE_ROW_PARTS = 2
"""Parts of inner products for one row on one CPU device; more rows and accelerators are faster with 1."""


@dataclass(frozen=True)
class Steps:
    """Compiled on first use of each shape. `start` is the absolute position of the first token."""

    forward: Callable[[Params, Tokens], Float[Array, "B T V"]]
    prefill: Callable[[Params, Tokens], KVLayers]
    extend: Callable[[Params, Tokens, Int[Array, ""], KVLayers], KVLayers]
    decode: Callable[[Params, Tokens, Int[Array, ""], KVLayers], tuple[Float[Array, "B T V"], KVLayers]]
    decode_donating: Callable[[Params, Tokens, Int[Array, ""], KVLayers], tuple[Float[Array, "B T V"], KVLayers]]


@functools.cache
def steps(architecture: Architecture, mesh: Mesh) -> Steps:
    """The steps of an architecture on a mesh; equal arguments share their compilations."""
    config = architecture.config
    kv_out = jax.tree.map(lambda _: kv_sharding(config, mesh), tuple((0, 0) for _ in config.layers))
    whole = replicated(mesh)
    exact = architecture.summing_in(EXACT_PARTS)

    def forward(params: Params, tokens: Array) -> Array:
        decoder = exact.bind(params)
        return decoder.logits(decoder(tokens, positions(tokens, 0), fresh_attend(config), ())[0])

    def prefill(params: Params, tokens: Array) -> KVLayers:
        return architecture.bind(params).prefill(tokens, positions(tokens, 0), fresh_attend(config), ())

    def extend(params: Params, tokens: Array, start: Array, kv: KVLayers) -> KVLayers:
        attend = cached_attend(config, start)
        return architecture.bind(params).prefill(tokens, positions(tokens, start), attend, kv)

    def decode(params: Params, tokens: Array, start: Array, kv: KVLayers) -> tuple[Array, KVLayers]:
        decoder = decode_architecture(architecture, mesh, tokens.size).bind(params)
        hidden, kv = decoder(tokens, positions(tokens, start), cached_attend(config, start), kv)
        return decoder.logits(hidden), kv

    return Steps(
        forward=jax.jit(forward, out_shardings=whole),
        prefill=jax.jit(prefill, out_shardings=kv_out),
        extend=jax.jit(extend, out_shardings=kv_out),
        decode=jax.jit(decode, out_shardings=(whole, kv_out)),
        decode_donating=jax.jit(decode, out_shardings=(whole, kv_out), donate_argnums=3),
    )


def decode_architecture(architecture: Architecture, mesh: Mesh, num_tokens: int) -> Architecture:
    """The architecture that computes a decode step of `num_tokens` tokens fastest on this mesh."""
    one_cpu = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    return architecture.summing_in(ONE_ROW_PARTS) if one_cpu and num_tokens == 1 else architecture


def positions(tokens: Tokens, start: Array | int) -> Int[Array, "B T"]:
    """The absolute positions of tokens `[B, T]` whose first is at `start`."""
    return jnp.broadcast_to(start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
