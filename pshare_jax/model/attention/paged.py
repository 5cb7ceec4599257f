"""Attention over paged KV: one function for prefill chunks and decode steps, replaceable by GPU and TPU kernels.

Each row has its own page table and lengths. `blocked` (blocked.py) serves, on GPUs the kernel (kernel.py); `gathered`
materialises all pages and is the tests' reference.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pshare_jax.model.attention.dense import Segment, attention, visible_keys
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.decoder import Attend
from pshare_jax.model.kv.pages import KVPages, LayerPages, slots_of, write_slots
from pshare_jax.model.paged_batch import PagedBatch


def positions_of(batch: PagedBatch, num_tokens: int) -> Int[Array, "B T"]:
    """Absolute positions of the new tokens."""
    return jnp.asarray(batch.context_lens)[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)


def _slots(
    batch: PagedBatch, num_tokens: int, page_size: int, independent: Bool[Array, ""] | None
) -> Int[Array, "B T"]:
    """Slots of the new tokens; padding and independent tokens are written to page 0."""
    real = jnp.arange(num_tokens) < jnp.asarray(batch.query_lens)[:, None]
    real = real if independent is None else real & ~independent
    positions = jnp.where(real, positions_of(batch, num_tokens), 0)
    return jnp.where(real, slots_of(jnp.asarray(batch.page_table), positions, page_size), 0)


PagedAttention = Callable[
    [Array, Array, Array, LayerPages, PagedBatch, int | None, float, float | None, Array | None], Array
]
"""(q, k, v, pages, batch, window, scale, softcap, independent) -> out: attention to the cached pages and the new k, v.

With `independent` each new token sees the pages' KV at all earlier positions and its own k, v, but no other new token.
"""


def paged_attend(
    config: ModelConfig, batch: PagedBatch, attention_fn: PagedAttention, independent: Bool[Array, ""] | None = None
) -> Attend:
    """`attend` over a pool: computes `attention_fn`, then writes the new tokens' keys and values into their slots.

    `independent` tokens are not written, because the pages hold the base's KV at their positions.
    """

    def attend(layer: int, q: Array | None, k: Array, v: Array, kv: KVPages) -> tuple[Array | None, KVPages]:
        pages, window = kv[layer], config.layers[layer].window
        slots = _slots(batch, k.shape[1], pages[0].shape[2], independent)
        out = None
        if q is not None:
            out = attention_fn(
                q, k, v, pages, batch, window, config.attention_scale, config.attention_softcap, independent
            )
        written = write_slots(pages, slots, k, v, after=k if out is None else out)
        return out, (*kv[:layer], written, *kv[layer + 1 :])

    return attend


def gathered(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    pages: LayerPages,
    batch: PagedBatch,
    window: int | None,
    scale: float,
    softcap: float | None,
    independent: Bool[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """The reference: for each row, one softmax over all pages of its table in dense form."""
    lengths, ends = jnp.asarray(batch.context_lens), stored_ends(batch, independent)

    def row(q: Array, k: Array, v: Array, table: Array, length: Array, end: Array) -> Array:
        cached = [part[:, table].reshape(part.shape[0], -1, part.shape[3]) for part in pages]
        positions, slots = length + jnp.arange(q.shape[0]), jnp.arange(cached[0].shape[1])
        stored = slots < end
        # Slots past the end may hold NaN, which a zero weight would not remove.
        cached_k, cached_v = (jnp.where(stored[:, None], part, 0)[None] for part in cached)
        old = Segment(cached_k, cached_v, visible_old(positions, slots, window, independent) & stored)
        own = visible_new(positions, window, independent)
        new = Segment(k.swapaxes(0, 1)[None], v.swapaxes(0, 1)[None], own)
        return attention(q[None], [old, new], scale=scale, softcap=softcap)[0]

    return jax.vmap(row)(q, k, v, jnp.asarray(batch.page_table), lengths, ends)


def stored_ends(batch: PagedBatch, independent: Array | None) -> Int[Array, "B"]:
    """The end of the KV that new tokens read; for independent tokens it includes the base's KV at their positions."""
    lengths = jnp.asarray(batch.context_lens)
    return lengths if independent is None else lengths + jnp.where(independent, jnp.asarray(batch.query_lens), 0)


def visible_old(positions: Array, slots: Array, window: int | None, independent: Array | None) -> Bool[Array, "T S"]:
    """The stored keys that each new token sees; an independent token uses its own key at its position."""
    visible = visible_keys(positions, slots, window)
    return visible if independent is None else visible & (~independent | (slots[None, :] != positions[:, None]))


def visible_new(
    positions: Array, window: int | None, independent: Array | None, keys: Array | None = None
) -> Bool[Array, "T S"]:
    """The new keys that each new token sees: those at the positions `keys`, or all of these tokens'."""
    keys = positions if keys is None else keys
    visible = visible_keys(positions, keys, window)
    return visible if independent is None else visible & (~independent | (keys[None, :] == positions[:, None]))
