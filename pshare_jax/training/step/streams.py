"""The hidden states of a batch's answers: of a decode stream on the frozen base's KV, or of an ordinary fine-tune.

All layers are scanned (model/layer_stack.py): first the base's over the context, which give the KV of each layer, then the
module's over the decode stream, of which each reads its own. No gradient reaches the base.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from pshare_jax.model.architecture import Params
from pshare_jax.model.attention.two_stream import (
    ContextStream,
    DecodeStream,
    Split,
    packed_attend,
    two_stream_attend,
)
from pshare_jax.model.decoder import Attend, Decoder, DecoderLayer, ropes_of
from pshare_jax.model.layer_stack import Place, is_stack, over_layers
from pshare_jax.model.layers import Projection
from pshare_jax.model.quantization import cast_params
from pshare_jax.training.config import Remat
from pshare_jax.training.data.batches import OneStreamBatch
from pshare_jax.training.step.embedding import embedding_rows
from pshare_jax.training.step.losses import Batch
from pshare_jax.training.step.mesh import row_axes
from pshare_jax.training.step.static import EMBEDDING, Objective

KEPT: dict[Remat, Any] = {
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What is kept of a layer for the backward pass, beside its input; the rest is computed again."""


def hidden_states(
    objective: Objective, params: Params, base_params: Params, batch: Batch, key: PRNGKeyArray | None
) -> Float[Array, "B R size"]:
    """The module's final hidden states that predict the batch's targets, in the compute dtype, from all its parameters; two
    streams also read the base's. Dropout only with a `key`.
    """
    if isinstance(batch, OneStreamBatch):
        hidden = _one_stream(objective, params, batch, key)
        return jnp.take_along_axis(hidden, jnp.asarray(batch.picks)[:, :, None], axis=1)
    context = ContextStream(jnp.asarray(batch.context_positions), jnp.asarray(batch.context_segments))
    kv = _base_kv(objective, jax.lax.stop_gradient(base_params), batch.context_tokens, context)
    streams = (batch.decode_positions, batch.decode_segments, batch.decode_turns, batch.decode_prefix)
    decode = DecodeStream(*(jnp.asarray(part) for part in streams))
    attend = two_stream_attend(objective.config, decode, context, _split(objective))
    return _through(objective, params, batch.decode_tokens, decode.positions, attend, key, kv)


def _one_stream(
    objective: Objective, params: Params, batch: OneStreamBatch, key: PRNGKeyArray | None
) -> Float[Array, "B T size"]:
    attend = packed_attend(objective.config, jnp.asarray(batch.segments), _split(objective))
    return _through(objective, params, batch.tokens, jnp.asarray(batch.positions), attend, key)


def _base_kv(objective: Objective, params: Params, tokens: Any, context: ContextStream) -> tuple:
    """Each layer's keys and values of the context, from the base."""
    architecture, config = objective.base, objective.config
    attend = packed_attend(config, context.segments, _split(objective))
    ropes = ropes_of(config, context.positions)

    def step(place: Place, weights: Params, x: Array, _: None) -> tuple[Array, Any]:
        layer = architecture.bind_layer(place.like, weights)
        arguments = (place.like, x, ropes[layer.rope], attend, None)
        if config.num_layers - 1 not in place.numbers:
            return layer(*arguments)
        # The last layer's output is not used.
        last = place.number == config.num_layers - 1
        return jax.lax.cond(last, lambda: (x, layer.store(*arguments)), lambda: layer(*arguments))

    x = _embedded(objective, architecture.without_layers.bind(params), tokens)
    return over_layers(config, params, step, x)[1]


def _through(
    objective: Objective,
    params: Params,
    tokens: Any,
    positions: Array,
    attend: Attend,
    key: PRNGKeyArray | None,
    kv: tuple = (),
) -> Float[Array, "B T size"]:
    """The module's final hidden states; `kv` are the base's."""
    architecture, config = objective.architecture, objective.config
    ropes = ropes_of(config, positions)
    dropout = objective.dropout if key is not None else 0.0

    def step(place: Place, weights: Params, x: Array, kv: Any) -> tuple[Array, None]:
        def run(weights: Params, x: Array, kv: Any, number: Array) -> Array:
            # Cast here, so that a step holds one layer's weights in the compute dtype.
            layer = architecture.bind_layer(place.like, cast_params(weights, objective.compute_dtype))
            if dropout and key is not None:
                set_dropout(layer, dropout, jax.random.fold_in(key, number))
            return layer(place.like, x, ropes[layer.rope], attend, kv)[0]

        if objective.remat != "none":
            # Within a scan, XLA does not merge the two passes anyhow.
            run = jax.checkpoint(run, policy=KEPT[objective.remat], prevent_cse=False)
        return run(weights, x, kv, place.number), None

    outer = _outer(objective, params)
    x, _ = over_layers(config, params, step, _embedded(objective, outer, tokens), kv)
    return outer.final_norm(x)


def _outer(objective: Objective, params: Params) -> Decoder:
    """Embedding, final norm and head. Rows of the embedding are cast after the lookup, so that the gradients of repeated
    tokens are summed in float32.
    """
    outside = {path: x for path, x in params.items() if not is_stack(path)}
    cast = {**cast_params(outside, objective.compute_dtype), EMBEDDING: outside[EMBEDDING]}
    return objective.architecture.without_layers.bind(cast)


def _embedded(objective: Objective, outer: Decoder, tokens: Any) -> Float[Array, "B T size"]:
    """The embedded tokens, split by rows as the batch is."""
    embedding = outer.embedding
    rows = embedding_rows(embedding.weight[...], jnp.asarray(tokens), objective.mesh, embedding.dtype)
    return embedding.scaled(rows)


def set_dropout(layer: DecoderLayer, rate: float, key: PRNGKeyArray) -> None:
    """LoRA's dropout, as in PEFT: applied to the input of A only, with a separate mask for each adapter."""
    nodes = [node for _, node in nnx.iter_modules(layer)]
    adapted = [node for node in nodes if isinstance(node, Projection) and node.lora_a is not None]
    for index, projection in enumerate(adapted):
        projection.drop = functools.partial(_dropout, jax.random.fold_in(key, index), rate)


def _dropout(key: PRNGKeyArray, rate: float, x: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _split(objective: Objective) -> Split:
    return Split(objective.mesh, row_axes(objective.mesh))
