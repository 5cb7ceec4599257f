"""Steps over paged KV as one program each: the reference of the chains in model/layered_steps.py."""

from typing import Any

import jax
import jax.numpy as jnp

import pshare_jax as ps
from pshare_jax.model.attention.blocked import blocked
from pshare_jax.model.attention.paged import paged_attend, positions_of
from pshare_jax.model.kv.pages import pages_out
from pshare_jax.model.scores import scores_of


def whole_prefill(model: ps.Model) -> Any:
    """`PagedSteps.prefill`."""

    def prefill(params, tokens, batch, pages):
        attend = paged_attend(model.config, batch, blocked)
        decoder = model.architecture.bind(params, batch.adapters)
        pages = decoder.prefill(tokens, positions_of(batch, tokens.shape[1]), attend, pages)
        return jnp.sum(jnp.asarray(batch.query_lens)), pages

    return jax.jit(prefill, out_shardings=(None, pages_out(model.config, model.mesh)))


def whole_score(model: ps.Model) -> Any:
    """`PagedSteps.score`."""

    def score(params, tokens, scored, pages):
        batch = scored.batch
        decoder = model.architecture.bind(params, batch.adapters)
        attend = paged_attend(model.config, batch, blocked, jnp.asarray(scored.independent))
        hidden, pages = decoder(tokens, positions_of(batch, tokens.shape[1]), attend, pages)
        return scores_of(decoder.logits(hidden), jnp.asarray(scored.targets), model.mesh), pages

    return jax.jit(score, out_shardings=(None, pages_out(model.config, model.mesh)))
