"""Dense attention: masked softmax over heads-first keys and values, and the two `attend` functions built on it.

The dense steps use it, and paged attention's reference. Heads-first products (`[B, K, queries, H] x [B, K, S, H]`) are
3-5x faster on CPU than a contraction over interleaved heads.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.model.config import ModelConfig
from pshare_jax.model.decoder import Attend
from pshare_jax.model.kv.dense import LayerKV, write
from pshare_jax.model.layers import soft_cap

QUERY_BLOCK = 128
"""Queries in a block of causal attention; keys after a block's last query are not multiplied."""


@dataclass(frozen=True)
class Segment:
    """A range of keys and values, and which of its S keys each of T queries sees, for all rows or for each row."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    visible: Bool[Array, "T S"] | Bool[Array, "B T S"]


def attention(
    q: Float[Array, "B T N H"], segments: Sequence[Segment], *, scale: float, softcap: float | None
) -> Float[Array, "B T N H"]:
    """Grouped-query attention to all segments' visible keys in one float32 softmax; a query must see a key."""
    B, T, N, H = q.shape
    K = segments[0].k.shape[1]
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)

    def scores(segment: Segment) -> Array:
        raw = jnp.einsum("BKQH,BKSH->BKQS", grouped, segment.k, preferred_element_type=jnp.float32) * scale
        capped = soft_cap(raw, softcap).reshape(B, K, N // K, T, -1)
        visible = segment.visible if segment.visible.ndim == 2 else segment.visible[:, None, None]
        return jnp.where(visible, capped, -jnp.inf)

    # Concatenating the segments' scores and splitting the weights would copy both.
    all_scores = [scores(segment) for segment in segments]
    highest = functools.reduce(jnp.maximum, [part.max(axis=-1, keepdims=True) for part in all_scores])
    weights = [jnp.exp(part - highest) for part in all_scores]
    total = functools.reduce(jnp.add, [part.sum(axis=-1, keepdims=True) for part in weights])

    def weighted(weight: Array, segment: Segment) -> Array:
        rows = weight.astype(q.dtype).reshape(B, K, N // K * T, -1)
        return jnp.einsum("BKQS,BKSH->BKQH", rows, segment.v, preferred_element_type=jnp.float32)

    parts = [weighted(weight, segment) for weight, segment in zip(weights, segments, strict=True)]
    out = (functools.reduce(jnp.add, parts) / total.reshape(B, K, -1, 1)).astype(q.dtype)
    return out.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def visible_keys(
    query_positions: Int[Array, "T"], key_positions: Int[Array, "S"], window: int | None
) -> Bool[Array, "T S"]:
    """A query sees the last `window` keys up to and including its own position, as in transformers; None means all."""
    distance = query_positions[:, None] - key_positions[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Self-attention of a whole sequence from position 0, computed for blocks of queries and their visible keys."""

    def block(start: int, end: int) -> Array:
        first = 0 if window is None else max(0, start - window + 1)
        visible = visible_keys(jnp.arange(start, end), jnp.arange(first, end), window)
        segment = Segment(k[:, :, first:end], v[:, :, first:end], visible)
        return attention(q[:, start:end], [segment], scale=scale, softcap=softcap)

    return in_query_blocks(q.shape[1], block)


def in_query_blocks(num_queries: int, block: Callable[[int, int], Array]) -> Float[Array, "B T N H"]:
    """The concatenated results of `block(start, end)` for all blocks of queries."""
    starts = range(0, num_queries, QUERY_BLOCK)
    outs = [block(start, min(start + QUERY_BLOCK, num_queries)) for start in starts]
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def fresh_attend(config: ModelConfig) -> Attend:
    """`attend` for a sequence from position 0: takes an empty kv and returns the call's keys and values."""

    def attend(
        layer: int, q: Array | None, k: Array, v: Array, kv: tuple[LayerKV, ...]
    ) -> tuple[Array | None, tuple[LayerKV, ...]]:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        kv = (*kv, (k, v))
        if q is None:
            return None, kv
        out = causal_attention(
            q,
            k,
            v,
            window=config.layers[layer].window,
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        )
        return out, kv

    return attend


def cached_attend(config: ModelConfig, start: Int[Array, ""]) -> Attend:
    """`attend` for tokens at positions `start`, `start` + 1, ...: reads the dense KV before them, then writes theirs.

    New keys are a separate segment, and the write depends on the attention's output; otherwise XLA copies every layer's
    whole cache several times in a step.
    """

    def attend(
        layer: int, q: Array | None, k: Array, v: Array, kv: tuple[LayerKV, ...]
    ) -> tuple[Array | None, tuple[LayerKV, ...]]:
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        out = None if q is None else attend_to(layer, q, k, v, kv[layer])
        return out, (*kv[:layer], write(kv[layer], start, k, v, after=out), *kv[layer + 1 :])

    def attend_to(layer: int, q: Array, k: Array, v: Array, old: LayerKV) -> Array:
        window = config.layers[layer].window
        positions, slots = start + jnp.arange(q.shape[1]), jnp.arange(old[0].shape[2])
        # Slots from `start` on hold padding or undefined values.
        cached = Segment(*old, visible_keys(positions, slots, window) & (slots < start))
        new = Segment(k, v, visible_keys(positions, positions, window))
        return attention(q, [cached, new], scale=config.attention_scale, softcap=config.attention_softcap)

    return attend
