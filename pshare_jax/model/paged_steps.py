"""The jitted steps over a pool of KV pages: prefill, decode, score, and page moves. The engine's workers call them.

Pages are donated and keep their sharding, so a pool is written in place and all batches of one shape share a
compilation, whatever their rows' lengths. Metadata (`PagedBatch`, page ids) are NumPy arrays.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from pshare_jax.mesh import replicated
from pshare_jax.model.architecture import Architecture, Params
from pshare_jax.model.attention.paged import PagedAttention, blocked, paged_attend, positions_of
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.dense_steps import decode_architecture
from pshare_jax.model.kv.pages import KVPages, PageContent, fill_pages, gather_pages, pages_out, scatter_pages
from pshare_jax.model.paged_batch import PagedBatch, ScoreBatch
from pshare_jax.model.sharding import content_sharding
from pshare_jax.sampling.sample import best_logprobs


class Scores(NamedTuple):
    """Log-probabilities of the targets, and ids and log-probabilities of the best tokens in descending order."""

    logprobs: Float[Array, "B T"]
    top_ids: Int[Array, "B T top"]
    top_logprobs: Float[Array, "B T top"]


@dataclass(frozen=True)
class PagedSteps:
    """Compiled on first use of each shape. All donate their pages."""

    prefill: Callable[[Params, Any, PagedBatch, KVPages], tuple[Int[Array, ""], KVPages]]
    """(params, tokens [B, T], batch, pages) -> (a number that is ready when the step is done, pages)."""
    decode: Callable[[Params, Any, PagedBatch, KVPages], tuple[Float[Array, "B V"], KVPages]]
    """(params, tokens [B, 1], batch, pages) -> (logits of the next token in float32, pages)."""
    score: Callable[[Params, Any, ScoreBatch, KVPages], tuple[Scores, KVPages]]
    """(params, tokens [B, T], score batch, pages) -> (scores of the targets, pages)."""


@dataclass(frozen=True)
class PageMoves:
    """Read, write and (debug mode) overwrite pages of a pool. `scatter` and `fill` donate their pages."""

    gather: Callable[[KVPages, Any], PageContent]
    scatter: Callable[[KVPages, Any, PageContent], KVPages]
    fill: Callable[[KVPages, Any, Any], KVPages]


@functools.cache
def paged_steps(architecture: Architecture, mesh: Mesh, attention_fn: PagedAttention = blocked) -> PagedSteps:
    """The steps of an architecture on a mesh with `attention_fn`; equal arguments share their compilations."""
    config, whole = architecture.config, replicated(mesh)
    out = pages_out(config, mesh)

    def prefill(params: Params, tokens: Int[Array, "B T"], batch: PagedBatch, pages: KVPages) -> tuple[Array, KVPages]:
        positions, attend = positions_of(batch, tokens.shape[1]), paged_attend(config, batch, attention_fn)
        pages = architecture.bind(params).prefill(tokens, positions, attend, pages)
        return jnp.sum(jnp.asarray(batch.query_lens)), pages

    def decode(params: Params, tokens: Int[Array, "B 1"], batch: PagedBatch, pages: KVPages) -> tuple[Array, KVPages]:
        decoder = decode_architecture(architecture, mesh, tokens.size).bind(params)
        hidden, pages = decoder(tokens, positions_of(batch, 1), paged_attend(config, batch, attention_fn), pages)
        return decoder.logits(hidden)[:, 0], pages

    def score(params: Params, tokens: Int[Array, "B T"], scored: ScoreBatch, pages: KVPages) -> tuple[Scores, KVPages]:
        batch, independent = scored.batch, jnp.asarray(scored.independent)
        decoder = architecture.bind(params)
        attend = paged_attend(config, batch, attention_fn, independent)
        hidden, pages = decoder(tokens, positions_of(batch, tokens.shape[1]), attend, pages)
        # Replicated, like the sampler's logits.
        logits = jax.lax.with_sharding_constraint(decoder.logits(hidden).reshape(tokens.size, -1), whole)
        scores = best_logprobs(logits, jnp.asarray(scored.targets).reshape(-1))
        return Scores(*(part.reshape(*tokens.shape, *part.shape[1:]) for part in scores)), pages

    return PagedSteps(
        prefill=jax.jit(prefill, out_shardings=(whole, out), donate_argnums=3),
        decode=jax.jit(decode, out_shardings=(whole, out), donate_argnums=3),
        score=jax.jit(score, out_shardings=(whole, out), donate_argnums=3),
    )


@functools.cache
def page_moves(config: ModelConfig, mesh: Mesh) -> PageMoves:
    """The page moves of a config's pools on a mesh."""
    out = pages_out(config, mesh)
    return PageMoves(
        gather=jax.jit(gather_pages, out_shardings=content_sharding(config, mesh)),
        scatter=jax.jit(scatter_pages, out_shardings=out, donate_argnums=0),
        fill=jax.jit(fill_pages, out_shardings=out, donate_argnums=0),
    )
