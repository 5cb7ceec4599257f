"""What is trained, and its loss: a decode module on the frozen base's KV (`prefillshare`), or the classic baseline (`full_ft`).

`nll` is the objective: pure and jittable, the sum of negative log-likelihoods of a batch's answers given the
base's KV of what is before each (two streams; PrefillShare, arXiv 2602.12029). Only `Trainee.trained` has gradients; the
base is a constant.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

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
from pshare_jax.model.decoder import Decoder
from pshare_jax.model.layers import LoraConfig, Projection
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.model import Model
from pshare_jax.training.config import Method, ModuleConfig
from pshare_jax.training.data.batches import Layout, OneStreamBatch, TwoStreamBatch
from pshare_jax.training.step.cross_entropy import rows_nll

EMBEDDING = "embedding.weight"


class Tallies(NamedTuple):
    """Trained tokens of a batch, and how many of them have the largest logit."""

    tokens: Float[Array, ""]
    correct: Float[Array, ""]


@dataclass(frozen=True)
class Objective:
    """What the loss is, without any weights: the base's decoder and the module's, on one mesh.

    The mesh may be an abstract one where nothing is computed.
    """

    base: Architecture
    architecture: Architecture
    mesh: Mesh | AbstractMesh
    compute_dtype: str
    dropout: float = 0.0
    remat: bool = True

    @property
    def config(self) -> ModelConfig:
        """The model's config, which base and module share."""
        return self.base.config

    @property
    def trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and sharding of the float32 masters: every parameter of the model (full), or A and B alone (lora)."""
        whole = self.architecture.lora is None
        return {
            path: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=parameter_sharding(path, self.config, self.mesh))
            for path, x in self.architecture.shapes.items()
            if whole or is_lora(path)
        }


@dataclass(frozen=True)
class Trainee:
    """A decode module in training, without its values. `base` is frozen, in the compute dtype; `frozen` is what the module
    reads beside what is trained, the base's own arrays.
    """

    base: Model
    objective: Objective
    method: Method
    frozen: Params

    @property
    def layout(self) -> Layout:
        """The batches that `nll` takes."""
        return "two_stream" if self.method == "prefillshare" else "one_stream"

    @property
    def trained(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and sharding of the masters."""
        return self.objective.trained

    def without_base(self) -> "Trainee":
        """The same, holding no weights of the base but those in `frozen`."""
        return replace(self, base=replace(self.base, params={}))


def module_architecture(base: Architecture, module: ModuleConfig) -> Architecture:
    """The decoder that is trained: the base's own, or with an adapter.

    Raises:
        PshareError: the adapter's targets are no projections of the model.
    """
    if module.kind == "full":
        return base
    architecture = base.with_lora(LoraConfig(module.rank, module.alpha / module.rank, tuple(module.targets)))
    if not any(map(is_lora, architecture.shapes)):
        raise PshareError(f"module.targets {module.targets} names no projection of the model.")
    return architecture


def make_trainee(
    base: Model, method: Method, module: ModuleConfig, compute_dtype: str, *, remat: bool = True
) -> Trainee:
    """What is trained of a decode module: all of it, or an adapter.

    Raises:
        PshareError: the adapter's targets are no projections of the model.
    """
    base = replace(
        base, params=_cast(base.params, compute_dtype), architecture=_typed(base.architecture, compute_dtype)
    )
    architecture = module_architecture(base.architecture, module)
    objective = Objective(base.architecture, architecture, base.mesh, compute_dtype, module.dropout, remat)
    return Trainee(base, objective, method, {} if module.kind == "full" else base.params)


def first_values(trainee: Trainee, seed: int) -> Params:
    """What training starts from: the base's own arrays, in the compute dtype (full), or an adapter that does nothing yet.

    A is PEFT's default (Kaiming uniform with a = sqrt 5: bound 1 / sqrt(in)), B zero.
    """
    if not trainee.frozen:
        return trainee.base.params
    draw = np.random.default_rng(seed)
    values = {}
    for path, like in trainee.trained.items():
        bound = like.shape[0] ** -0.5 if path.endswith("lora_a") else 0.0
        drawn = draw.uniform(-bound, bound, like.shape).astype(np.float32)
        values[path] = jax.device_put(drawn, like.sharding)
    return values


def nll(
    objective: Objective,
    trainable: Params,
    frozen: Params,
    base_params: Params,
    batch: TwoStreamBatch | OneStreamBatch,
    key: PRNGKeyArray | None,
) -> tuple[Float[Array, ""], Tallies]:
    """The sum of -log p over the batch's trained tokens, in float32.

    With a `key` the adapter's inputs are dropped out as the config says; without (evaluation) nothing is.
    """
    params = {**frozen, **_cast(trainable, objective.compute_dtype)}
    if EMBEDDING in trainable:
        # Its rows are cast when they are looked up, so that the slopes of a token's many rows are added in float32.
        params[EMBEDDING] = trainable[EMBEDDING]
    decoder = objective.architecture.bind(params)
    if key is not None and objective.dropout:
        _set_dropout(decoder, objective.dropout, key)
    if isinstance(batch, TwoStreamBatch):
        hidden = _decode_stream(objective, decoder, base_params, batch)
    else:
        hidden = _picked(objective, decoder, batch)
    real, config = jnp.asarray(batch.weights), objective.config
    total, correct = rows_nll(
        hidden,
        decoder.head_weight,
        jnp.asarray(batch.targets),
        real,
        mesh=objective.mesh,
        tied=config.tied,
        softcap=config.final_softcap,
        weight_grad=not frozen,
    )
    return total, Tallies(real.sum(), correct)


def _decode_stream(
    objective: Objective, decoder: Decoder, base_params: Params, batch: TwoStreamBatch
) -> Float[Array, "B D size"]:
    config = objective.config
    segments, positions = jnp.asarray(batch.context_segments), jnp.asarray(batch.context_positions)
    base = objective.base.bind(jax.lax.stop_gradient(base_params))
    kv = base.prefill(jnp.asarray(batch.context_tokens), positions, packed_attend(config, segments, keep_kv=True), ())
    context = ContextStream(positions, segments, jax.lax.stop_gradient(kv))
    places = (batch.decode_positions, batch.decode_segments, batch.decode_turns, batch.decode_prefix)
    decode = DecodeStream(*(jnp.asarray(part) for part in places))
    attend = two_stream_attend(config, decode, context)
    return decoder(jnp.asarray(batch.decode_tokens), decode.positions, attend, (), remat=objective.remat)[0]


def _picked(objective: Objective, decoder: Decoder, batch: OneStreamBatch) -> Float[Array, "B R size"]:
    attend = packed_attend(objective.config, jnp.asarray(batch.segments), keep_kv=False)
    tokens, positions = jnp.asarray(batch.tokens), jnp.asarray(batch.positions)
    hidden, _ = decoder(tokens, positions, attend, (), remat=objective.remat)
    return jnp.take_along_axis(hidden, jnp.asarray(batch.picks)[:, :, None], axis=1)


def decode_module(trainee: Trainee, trainable: Params) -> DecodeModule:
    """The module as it is now, in the base's dtype and sharding, for serving, evaluation and saving."""
    dtype, mesh = trainee.base.architecture.dtype, trainee.base.mesh
    shardings = {path: like.sharding for path, like in trainee.trained.items()}
    params = {**trainee.frozen, **jax.device_put(_cast(trainable, dtype), shardings)}
    return DecodeModule(_typed(trainee.objective.architecture, dtype), params, mesh)


# --- parts -----------------------------------------------------------------------------------------------------------


def _set_dropout(decoder: Decoder, rate: float, key: PRNGKeyArray) -> None:
    """LoRA's dropout (PEFT): of each adapter's inputs, on their way to A alone."""
    places = [one for _, one in nnx.iter_modules(decoder) if isinstance(one, Projection) and one.lora_a is not None]
    for index, place in enumerate(places):
        place.drop = functools.partial(_dropped, jax.random.fold_in(key, index), rate)


def _dropped(key: PRNGKeyArray, rate: float, x: Array) -> Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _typed(architecture: Architecture, dtype: str) -> Architecture:
    return replace(architecture, build=replace(architecture.build, dtype=dtype))


def _cast(params: Mapping[str, Array], dtype: str) -> Params:
    return {path: array.astype(dtype) for path, array in params.items()}
