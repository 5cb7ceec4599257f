"""The two `attend` functions of training: over packed rows, and of a decode stream over the base's KV of its context.

A row holds several samples, distinguished by segments. A turn's decode stream sees the base's KV at positions before
its first input, and its own turn (the two-stream objective, training/step).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Int

from pshare_jax.model.attention.flash import Keys, KeySet, Queries, Scoring, flash_attention
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.decoder import Attend
from pshare_jax.model.kv.dense import LayerKV


class Split(NamedTuple):
    """The mesh of the arrays, and those of its axes that split rows."""

    mesh: Mesh | AbstractMesh
    row_axes: tuple[str, ...] = ()


def packed_attend(config: ModelConfig, segments: Int[Array, "B T"], split: Split) -> Attend:
    """`attend` of packed rows, causal within each segment. The result's kv is the layer's keys and values."""
    # Within a segment, distances of indices equal distances of positions.
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    queries, keys = Queries(segments, index, index), Keys(segments, index, index)

    def attend(layer: int, q: Array | None, k: Array, v: Array, kv: Any) -> tuple[Array | None, LayerKV]:
        stored = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if q is None:
            return None, stored
        own = KeySet(*stored, keys, queries)
        return flash_attention(q, (), (own,), _scoring(config, layer), *split), stored

    return attend


class DecodeStream(NamedTuple):
    """A decode stream's positions, segments, turns (0: padding) and numbers of visible leading base positions."""

    positions: Int[Array, "B D"]
    segments: Int[Array, "B D"]
    turns: Int[Array, "B D"]
    prefix: Int[Array, "B D"]


class ContextStream(NamedTuple):
    """Positions and segments of the context tokens."""

    positions: Int[Array, "B C"]
    segments: Int[Array, "B C"]


def two_stream_attend(config: ModelConfig, decode: DecodeStream, context: ContextStream, split: Split) -> Attend:
    """`attend` of the decode module in training. kv is the base's keys and values of the context in this layer, which get no
    gradient.
    """
    index = jnp.broadcast_to(jnp.arange(decode.turns.shape[1]), decode.turns.shape)
    old_keys = Keys(context.segments, context.positions, context.positions)
    old_queries = Queries(decode.segments, decode.prefix - 1, decode.positions)
    own_keys = Keys(decode.turns, index, decode.positions)
    own_queries = Queries(decode.turns, index, decode.positions)

    def attend(layer: int, q: Array | None, k: Array, v: Array, kv: LayerKV) -> tuple[Array | None, LayerKV]:
        assert q is not None
        old = KeySet(*jax.lax.stop_gradient(kv), old_keys, old_queries)
        own = KeySet(k.swapaxes(1, 2), v.swapaxes(1, 2), own_keys, own_queries)
        return flash_attention(q, (old,), (own,), _scoring(config, layer), *split), kv

    return attend


def _scoring(config: ModelConfig, layer: int) -> Scoring:
    return Scoring(config.attention_scale, config.attention_softcap, config.layers[layer].window)
