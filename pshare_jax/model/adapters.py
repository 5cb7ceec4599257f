"""LoRA adapters that lie stacked, so that the rows of one step may each have another adapter, or none.

A row names its adapter by a slot, 0 for none (`PagedBatch.adapters`). Slot s is entry s - 1 of the stacks, so none takes no
memory. All adapters have the stack's rank and targets: what one lacks is zero, and its scale is part of B. `Projection` calls
this; share/adapter_stack.py owns the arrays.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class LoraStack:
    """The shape of stacked adapters: the number of slots besides 0, their rank, and the projections that have them."""

    slots: int
    rank: int
    targets: tuple[str, ...]


def stacked_product(
    x: Float[Array, "B T I"], a: Float[Array, "S R I"], b: Float[Array, "S R O"], slots: Int[Array, "B"]
) -> Float[Array, "B T O"]:
    """x A B of every row's own adapter, and 0 for rows of slot 0.

    A is stored transposed, so that both forms read it as it lies.
    """
    if gathers(x.shape[0], x.shape[1], a.shape[0]):
        own = jnp.maximum(slots - 1, 0)
        low_rank = jnp.einsum("BTI,BRI->BTR", x, a[own])
        return jnp.einsum("BTR,BRO->BTO", jnp.where(slots[:, None, None] > 0, low_rank, 0), b[own])
    mine = slots[:, None] == 1 + jnp.arange(a.shape[0])
    low_rank = jnp.einsum("BTI,CI->BTC", x, a.reshape(-1, a.shape[2])).reshape(*x.shape[:2], *a.shape[:2])
    low_rank = jnp.where(mine[:, None, :, None], low_rank, 0)
    # Both products are plain matrix products: XLA on CPU has no fast form for two inner axes.
    return jnp.einsum("BTC,CO->BTO", low_rank.reshape(*x.shape[:2], -1), b.reshape(-1, b.shape[2]))


def gathers(num_rows: int, num_tokens: int, num_slots: int) -> bool:
    """Whether a step reads each row's own A and B, and not those of all slots at once in two wide products.

    Wide products read each slot once but multiply every token with all slots; gathering copies A and B for each row. So
    decode steps gather while they have no more rows than there are slots, and longer rows always (measured on CPU for 1 to
    16 slots, docs/performance.md). One slot is one plain product.
    """
    return num_slots > 1 and (num_tokens > 1 or num_rows <= num_slots)
