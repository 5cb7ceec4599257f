"""The two `attend` functions of training: over packed rows, and of a decode stream over the base's KV of its context.

A row holds several samples, distinguished by segments. A turn's decode stream sees the base's KV at positions before
its first input, and its own turn (the two-stream objective, training/step). Blocks of queries keep the scores small.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pshare_jax.model.attention.dense import Segment, attention, in_query_blocks, visible_keys
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.decoder import Attend
from pshare_jax.model.kv.dense import LayerKV


def packed_attend(config: ModelConfig, segments: Int[Array, "B T"], *, keep_kv: bool) -> Attend:
    """`attend` of packed rows, causal within each segment. With `keep_kv` the result's kv is the keys and values."""

    def attend(layer: int, q: Array | None, k: Array, v: Array, kv: tuple) -> tuple[Array | None, tuple]:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        kv = (*kv, (k, v)) if keep_kv else kv
        return None if q is None else attend_to(layer, q, k, v), kv

    def attend_to(layer: int, q: Array, k: Array, v: Array) -> Array:
        window = config.layers[layer].window

        def block(start: int, end: int) -> Array:
            # Within a segment, distances of indices equal distances of positions.
            first = 0 if window is None else max(0, start - window + 1)
            causal = visible_keys(jnp.arange(start, end), jnp.arange(first, end), window)
            visible = causal & (segments[:, start:end, None] == segments[:, None, first:end])
            return _attention(config, q[:, start:end], [Segment(k[:, :, first:end], v[:, :, first:end], visible)])

        return in_query_blocks(q.shape[1], block)

    return attend


class DecodeStream(NamedTuple):
    """A decode stream's positions, segments, turns (0: padding) and numbers of visible leading base positions."""

    positions: Int[Array, "B D"]
    segments: Int[Array, "B D"]
    turns: Int[Array, "B D"]
    prefix: Int[Array, "B D"]


class ContextStream(NamedTuple):
    """Positions and segments of the context tokens, and each layer's keys and values from the base."""

    positions: Int[Array, "B C"]
    segments: Int[Array, "B C"]
    kv: tuple[LayerKV, ...]


def two_stream_attend(config: ModelConfig, decode: DecodeStream, context: ContextStream) -> Attend:
    """`attend` of the decode module in training; returns kv unchanged."""

    def attend(layer: int, q: Array | None, k: Array, v: Array, kv: Any) -> tuple[Array | None, Any]:
        assert q is not None
        return attend_to(layer, q, k.swapaxes(1, 2), v.swapaxes(1, 2)), kv

    def attend_to(layer: int, q: Array, k: Array, v: Array) -> Array:
        window = config.layers[layer].window

        def block(start: int, end: int) -> Array:
            queries = DecodeStream(*(part[:, start:end] for part in decode))
            old = Segment(*context.kv[layer], _visible_context(queries, context, window))
            own = Segment(k[:, :, :end], v[:, :, :end], _visible_turn(queries, decode, start, end, window))
            return _attention(config, q[:, start:end], [old, own])

        return in_query_blocks(q.shape[1], block)

    return attend


def _visible_context(queries: DecodeStream, context: ContextStream, window: int | None) -> Bool[Array, "B T C"]:
    own_sample = queries.segments[:, :, None] == context.segments[:, None]
    before = context.positions[:, None] < queries.prefix[:, :, None]
    return own_sample & before & _in_window(queries.positions, context.positions, window)


def _visible_turn(
    queries: DecodeStream, decode: DecodeStream, start: int, end: int, window: int | None
) -> Bool[Array, "B T S"]:
    """Each query sees its own turn up to itself, so that padding, too, sees at least one key."""
    own_turn = queries.turns[:, :, None] == decode.turns[:, None, :end]
    before = jnp.arange(start, end)[:, None] >= jnp.arange(end)
    return own_turn & before & _in_window(queries.positions, decode.positions[:, :end], window)


def _in_window(queries: Int[Array, "B T"], keys: Int[Array, "B S"], window: int | None) -> Bool[Array, "B T S"]:
    distance = queries[:, :, None] - keys[:, None]
    return jnp.ones(distance.shape, bool) if window is None else distance < window


def _attention(config: ModelConfig, q: Array, segments: list[Segment]) -> Array:
    return attention(q, segments, scale=config.attention_scale, softcap=config.attention_softcap)
