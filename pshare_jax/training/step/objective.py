"""The training objective: a decode module on the frozen base's KV (`prefillshare`), or ordinary fine-tuning
(`full_ft`).

`batch_loss` is pure and jittable: the loss (losses.py) of a batch's answers, each given the base's KV of the tokens before it
(two streams; PrefillShare, arXiv 2602.12029). Only the trainable parameters have gradients.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Architecture, Params, is_lora
from pshare_jax.model.attention.two_stream import ContextStream, DecodeStream, packed_attend, two_stream_attend
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.decoder import Attend, Decoder
from pshare_jax.model.layers import LoraConfig, Projection
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.model import Model
from pshare_jax.training.config import TARGETS, Method, ModuleConfig
from pshare_jax.training.data.batches import Layout, OneStreamBatch, TwoStreamBatch
from pshare_jax.training.step.chunks import Head
from pshare_jax.training.step.cross_entropy import Sft
from pshare_jax.training.step.embedding import embedding_rows
from pshare_jax.training.step.losses import Batch, Guided, Loss, Tallies

EMBEDDING, HEAD = "embedding.weight", "head"


@dataclass(frozen=True)
class Objective:
    """The loss and the architectures of base and module on one mesh (abstract if nothing is computed), without weights."""

    base: Architecture
    architecture: Architecture
    mesh: Mesh | AbstractMesh
    compute_dtype: str
    dropout: float = 0.0
    remat: bool = True
    loss: Loss = Sft()

    @property
    def config(self) -> ModelConfig:
        """The model's config, which base and module share."""
        return self.base.config

    @property
    def trainable_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and sharding of the float32 master weights: all parameters (full), or only A and B (lora)."""
        whole = self.architecture.lora is None
        return {
            path: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=parameter_sharding(path, self.config, self.mesh))
            for path, x in self.architecture.shapes.items()
            if whole or is_lora(path)
        }


@dataclass(frozen=True)
class TrainableModule:
    """A decode module in training: everything but the trainable parameters. `base` is in the compute dtype; `frozen`
    are the arrays of the base that the module reads beside the trainable parameters.
    """

    base: Model
    objective: Objective
    method: Method
    frozen: Params

    @property
    def layout(self) -> Layout:
        """The layout of the batches that `batch_loss` takes."""
        return "two_stream" if self.method == "prefillshare" else "one_stream"

    @property
    def trainable_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and sharding of the float32 master weights."""
        return self.objective.trainable_shapes

    def without_base(self) -> "TrainableModule":
        """The same without the base's weights, except those in `frozen`."""
        return replace(self, base=replace(self.base, params={}))


def module_architecture(base: Architecture, module: ModuleConfig) -> Architecture:
    """The architecture of the decode module: the base's, for LoRA with an adapter.

    Raises:
        PshareError: no projection of the model is among the adapter's targets.
    """
    if module.kind == "full":
        return base
    architecture = base.with_lora(LoraConfig(module.rank, module.alpha / module.rank, tuple(module.targets)))
    if not any(map(is_lora, architecture.shapes)):
        raise PshareError(
            f"module.targets {module.targets} matches no projection of the model; use some of {', '.join(TARGETS)}."
        )
    return architecture


def trainable_module(
    base: Model,
    method: Method,
    module: ModuleConfig,
    compute_dtype: str,
    *,
    remat: bool = True,
    loss: Loss | None = None,
) -> TrainableModule:
    """A decode module of `base` to train, all weights or an adapter, with this loss (None: supervised fine-tuning).

    Raises:
        PshareError: no projection of the model is among the adapter's targets.
    """
    base = replace(
        base, params=_cast(base.params, compute_dtype), architecture=_typed(base.architecture, compute_dtype)
    )
    architecture = module_architecture(base.architecture, module)
    objective = Objective(
        base.architecture, architecture, base.mesh, compute_dtype, module.dropout, remat, loss or Sft()
    )
    return TrainableModule(base, objective, method, {} if module.kind == "full" else base.params)


def init_trainable(module: TrainableModule, seed: int) -> Params:
    """Initial trainable parameters: the base's arrays in the compute dtype (full), or an adapter without effect (lora).

    A is drawn as in PEFT (Kaiming uniform with a = sqrt 5: bound 1 / sqrt(in)); B is zero.
    """
    if not module.frozen:
        return module.base.params
    draw = np.random.default_rng(seed)
    values = {}
    for path, like in module.trainable_shapes.items():
        bound = like.shape[0] ** -0.5 if path.endswith("lora_a") else 0.0
        drawn = draw.uniform(-bound, bound, like.shape).astype(np.float32)
        values[path] = jax.device_put(drawn, like.sharding)
    return values


def batch_loss(
    objective: Objective,
    trainable: Params,
    frozen: Params,
    base_params: Params,
    batch: Batch | Guided,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, ""], Tallies]:
    """The sum of the batch's losses, in float32. Dropout is applied only with a `key`."""
    guided = batch if isinstance(batch, Guided) else None
    read = batch.batch if isinstance(batch, Guided) else batch
    params = {**frozen, **_cast(trainable, objective.compute_dtype)}
    if EMBEDDING in trainable:
        # Rows are cast after the lookup, so that the gradients of repeated tokens are summed in float32.
        params[EMBEDDING] = trainable[EMBEDDING]
    hidden = hidden_states(objective, params, base_params, read, key)
    # The master weight, if it is trained: its gradient is summed over devices in its own dtype.
    head = head_of(objective, {**params, **trainable})._replace(trained=not frozen)
    return objective.loss(head, hidden, read, guided)


def head_of(objective: Objective, params: Params) -> Head:
    """The LM head among `params`, not trained."""
    config = objective.config
    return Head(params[EMBEDDING if config.tied else HEAD], objective.mesh, config.tied, config.final_softcap, False)


def hidden_states(
    objective: Objective, params: Params, base_params: Params, batch: Batch, key: PRNGKeyArray | None
) -> Float[Array, "B D size"]:
    """The module's hidden states at the targets, from all its parameters; two streams also read the base's."""
    decoder = objective.architecture.bind(params)
    if key is not None and objective.dropout:
        _set_dropout(decoder, objective.dropout, key)
    if isinstance(batch, TwoStreamBatch):
        return _decode_stream(objective, decoder, base_params, batch)
    return _one_stream(objective, decoder, batch)


def _decode_stream(
    objective: Objective, decoder: Decoder, base_params: Params, batch: TwoStreamBatch
) -> Float[Array, "B D size"]:
    config = objective.config
    segments, positions = jnp.asarray(batch.context_segments), jnp.asarray(batch.context_positions)
    base = objective.base.bind(jax.lax.stop_gradient(base_params))
    x = _embedded(objective, base, batch.context_tokens)
    kv = base.stored(x, positions, packed_attend(config, segments, keep_kv=True), ())
    context = ContextStream(positions, segments, jax.lax.stop_gradient(kv))
    streams = (batch.decode_positions, batch.decode_segments, batch.decode_turns, batch.decode_prefix)
    decode = DecodeStream(*(jnp.asarray(part) for part in streams))
    attend = two_stream_attend(config, decode, context)
    return _hidden(objective, decoder, batch.decode_tokens, decode.positions, attend)


def _one_stream(objective: Objective, decoder: Decoder, batch: OneStreamBatch) -> Float[Array, "B R size"]:
    attend = packed_attend(objective.config, jnp.asarray(batch.segments), keep_kv=False)
    hidden = _hidden(objective, decoder, batch.tokens, jnp.asarray(batch.positions), attend)
    return jnp.take_along_axis(hidden, jnp.asarray(batch.picks)[:, :, None], axis=1)


def _hidden(objective: Objective, decoder: Decoder, tokens: Any, positions: Array, attend: Attend) -> Array:
    x = _embedded(objective, decoder, tokens)
    return decoder.hidden(x, positions, attend, (), remat=objective.remat)[0]


def _embedded(objective: Objective, decoder: Decoder, tokens: Any) -> Float[Array, "B T size"]:
    """The embedded tokens, split by rows as the batch is."""
    embedding = decoder.embedding
    rows = embedding_rows(embedding.weight[...], jnp.asarray(tokens), objective.mesh, embedding.dtype)
    return embedding.scaled(rows)


def decode_module(module: TrainableModule, trainable: Params) -> DecodeModule:
    """The decode module with these parameters in the base's dtype and sharding, for evaluation and saving."""
    dtype, mesh = module.base.architecture.dtype, module.base.mesh
    shardings = {path: like.sharding for path, like in module.trainable_shapes.items()}
    params = {**module.frozen, **jax.device_put(_cast(trainable, dtype), shardings)}
    return DecodeModule(_typed(module.objective.architecture, dtype), params, mesh)


# --- parts -----------------------------------------------------------------------------------------------------------


def _set_dropout(decoder: Decoder, rate: float, key: PRNGKeyArray) -> None:
    """LoRA's dropout, as in PEFT: applied to the input of A only, with a separate mask for each adapter."""
    nodes = [node for _, node in nnx.iter_modules(decoder)]
    adapted = [node for node in nodes if isinstance(node, Projection) and node.lora_a is not None]
    for index, projection in enumerate(adapted):
        projection.drop = functools.partial(_dropout, jax.random.fold_in(key, index), rate)


def _dropout(key: PRNGKeyArray, rate: float, x: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _typed(architecture: Architecture, dtype: str) -> Architecture:
    return replace(architecture, build=replace(architecture.build, dtype=dtype))


def _cast(params: Mapping[str, Array], dtype: str) -> Params:
    return {path: array.astype(dtype) for path, array in params.items()}
