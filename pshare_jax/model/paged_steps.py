"""The jitted steps over a pool of KV pages: prefill, decode, score, and page moves. The engine's workers call them.

Pages are donated and keep their sharding, so a pool is written in place and all batches of one shape share a
compilation, whatever their rows' lengths. Metadata (`PagedBatch`, page ids) are NumPy arrays, but for what decode steps
keep on the device by slot: the last token of each sequence, and its page table.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pshare_jax.mesh import replicated
from pshare_jax.model.architecture import Architecture, Params
from pshare_jax.model.attention.blocked import blocked
from pshare_jax.model.attention.paged import PagedAttention, paged_attend, positions_of
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.dense_steps import decode_architecture
from pshare_jax.model.kv.pages import KVPages, PageContent, fill_pages, gather_pages, pages_out
from pshare_jax.model.layered_steps import layered_prefill, layered_scatter, layered_score
from pshare_jax.model.paged_batch import AttentionForm, DecodeBatch, PagedBatch, ScoreBatch
from pshare_jax.model.scores import Scores
from pshare_jax.model.sharding import content_sharding


@dataclass(frozen=True)
class PagedSteps:
    """Compiled on first use of each shape. All donate their pages."""

    prefill: Callable[[Params, Any, PagedBatch, KVPages], tuple[Int[Array, ""], KVPages]]
    """(params, tokens [B, T], batch, pages) -> (a number that is ready when the step is done, pages)."""
    decode: Callable[[Params, DecodeBatch, Any, KVPages], tuple[tuple[Float[Array, "B V"], Any], KVPages]]
    """(params, batch, page tables [slots + 1, M], pages) -> ((logits of the next token in float32, page tables), pages).

    Donates the page tables too."""
    score: Callable[[Params, Any, ScoreBatch, KVPages], tuple[Scores, KVPages]]
    """(params, tokens [B, T], score batch, pages) -> (scores of the targets, pages)."""


@dataclass(frozen=True)
class PageMoves:
    """Read, write and (debug mode) overwrite pages of a pool, and write a slot's page table; what is written is donated."""

    gather: Callable[[KVPages, Any], PageContent]
    scatter: Callable[[KVPages, Any, PageContent], KVPages]
    fill: Callable[[KVPages, Any, Any], KVPages]
    put_table: Callable[[Any, Any, Any], Any]
    """(page tables [slots + 1, M], slot, its page table [M]) -> page tables."""


@functools.cache
def paged_steps(architecture: Architecture, mesh: Mesh, attention_fn: PagedAttention | None = None) -> PagedSteps:
    """The steps of an architecture on a mesh with its form of attention, or with `attention_fn`; equal arguments share their
    compilations.
    """
    config, whole = architecture.config, replicated(mesh)
    attention_fn = attention_fn or attention_of(architecture.build.attention, mesh)
    out = pages_out(config, mesh)

    def decode(
        params: Params, rows: DecodeBatch, tables: Int[Array, "slots M"], pages: KVPages
    ) -> tuple[tuple[Array, Array], KVPages]:
        slots, lens, page_size = jnp.asarray(rows.slots), jnp.asarray(rows.context_lens), pages[0][0].shape[2]
        tables = tables.at[slots, lens // page_size].set(rows.new_pages)
        real = (slots < len(tables) - 1).astype(jnp.int32)
        batch = PagedBatch(tables[slots], lens, real, jnp.asarray(rows.adapters), rows.shared)
        tokens = jnp.where(real == 1, rows.tokens[slots], 0)[:, None]
        decoder = decode_architecture(architecture, mesh, tokens.size).bind(params, batch.adapters)
        hidden, pages = decoder(tokens, positions_of(batch, 1), paged_attend(config, batch, attention_fn), pages)
        return (decoder.logits(hidden)[:, 0], tables), pages

    return PagedSteps(
        prefill=layered_prefill(architecture, mesh, attention_fn),
        decode=jax.jit(decode, out_shardings=((whole, whole), out), donate_argnums=(2, 3)),
        score=layered_score(architecture, mesh, attention_fn),
    )


def attention_of(form: AttentionForm, mesh: Mesh) -> PagedAttention:
    """The function of a form of attention; on CPU the kernel is interpreted, which is for tests."""
    if form == "xla":
        return blocked
    # An experimental part of JAX, which other platforms do without.
    from pshare_jax.model.attention.kernel import kernel_attention

    return kernel_attention(mesh, interpret=mesh.devices.flat[0].platform == "cpu")


@functools.cache
def page_moves(config: ModelConfig, mesh: Mesh) -> PageMoves:
    """The page moves of a config's pools on a mesh."""
    out = pages_out(config, mesh)
    return PageMoves(
        gather=jax.jit(gather_pages, out_shardings=content_sharding(config, mesh)),
        scatter=layered_scatter(config, mesh),
        fill=jax.jit(fill_pages, out_shardings=out, donate_argnums=0),
        put_table=jax.jit(_put_table, out_shardings=replicated(mesh), donate_argnums=0),
    )


def _put_table(tables: Int[Array, "slots M"], slot: Int[Array, ""], table: Int[Array, "M"]) -> Int[Array, "slots M"]:
    return tables.at[slot].set(table)
