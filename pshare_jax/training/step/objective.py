"""The training objective: a decode module on the frozen base's KV (`prefillshare`), or ordinary fine-tuning
(`full_ft`).

`batch_loss` is pure and jittable: the loss (losses.py) of a batch's answers, each given the base's KV of the tokens before it
(two streams; PrefillShare, arXiv 2602.12029). Only the trainable parameters have gradients. Layers are stacked in all parameters
of training (model/layer_stack.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from pshare_jax.model.architecture import Params, is_lora
from pshare_jax.model.layer_stack import stack_layers, unstack_layers
from pshare_jax.model.quantization import cast_params, dequantized
from pshare_jax.share.decode_module import DecodeModule
from pshare_jax.share.model import Model
from pshare_jax.training.config import Method, ModuleConfig, Remat
from pshare_jax.training.data.batches import Layout
from pshare_jax.training.step.chunks import Head
from pshare_jax.training.step.losses import Batch, Guided, Loss, Tallies
from pshare_jax.training.step.static import EMBEDDING, HEAD, Objective, make_objective
from pshare_jax.training.step.streams import hidden_states


@dataclass(frozen=True)
class TrainableModule:
    """A decode module in training: everything but the trainable parameters.

    `base` is the base in the compute dtype without its weights; these are `base_params`. `frozen` are those that the module
    reads beside the trainable parameters.
    """

    base: Model
    objective: Objective
    method: Method
    base_params: Params
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
        return replace(self, base_params={})


class StackedBase(NamedTuple):
    """A base in the compute dtype without its weights, and these in stacks."""

    model: Model
    params: Params


def stacked_base(base: Model, compute_dtype: str, *, take: bool = False) -> StackedBase:
    """The base for training.

    With `take` the arrays leave `base.params`, so that weights and their stacks are not held at once.
    """
    arrays = base.params if take else dict(base.params)
    params = cast_params(stack_layers(arrays, base.config, base.mesh), compute_dtype)
    return StackedBase(replace(base, params={}, architecture=base.architecture.with_dtype(compute_dtype)), params)


def module_on(
    base: StackedBase, method: Method, module: ModuleConfig, *, remat: Remat = "layer", loss: Loss | None = None
) -> TrainableModule:
    """A decode module of `base` to train, all weights or an adapter, with this loss (None: supervised fine-tuning).

    Raises:
        PshareError: no projection of the model is among the adapter's targets.
    """
    model = base.model
    objective = make_objective(model.architecture, module, model.mesh, model.architecture.dtype, remat, loss)
    return TrainableModule(model, objective, method, base.params, {} if module.kind == "full" else base.params)


def trainable_module(
    base: Model, method: Method, module: ModuleConfig, compute_dtype: str, *, loss: Loss | None = None
) -> TrainableModule:
    """`module_on` a base that stays as it is."""
    return module_on(stacked_base(base, compute_dtype), method, module, loss=loss)


def init_trainable(module: TrainableModule, seed: int) -> Params:
    """Initial trainable parameters: the base's arrays in the compute dtype, none quantised (full), or an adapter without effect
    (lora).
    """
    if not module.frozen:
        return dequantized(module.base_params, module.objective.compute_dtype)
    return stack_layers(drawn_adapter(module.objective, seed), module.objective.config, module.base.mesh)


def drawn_adapter(objective: Objective, seed: int) -> dict[str, Any]:
    """A new adapter's NumPy arrays in float32, drawn as in PEFT: A is Kaiming uniform with a = sqrt 5, of bound
    1 / sqrt(in), and B zero.
    """
    draw = np.random.default_rng(seed)
    values = {}
    for path, like in objective.architecture.shapes.items():
        if is_lora(path):
            bound = like.shape[0] ** -0.5 if path.endswith("lora_a") else 0.0
            values[path] = draw.uniform(-bound, bound, like.shape).astype(np.float32)
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
    params = {**frozen, **trainable}
    hidden = hidden_states(objective, params, base_params, read, key)
    # The master weight, if it is trained: its gradient is summed over devices in its own dtype.
    head = head_of(objective, params)._replace(trained=not frozen)
    return objective.loss(head, hidden, read, guided)


def head_of(objective: Objective, params: Params) -> Head:
    """The LM head among `params`, not trained."""
    config = objective.config
    return Head(params[EMBEDDING if config.tied else HEAD], objective.mesh, config.tied, config.final_softcap, False)


def decode_module(
    objective: Objective, trainable: Params, base_params: Mapping[str, Array] | None = None
) -> DecodeModule:
    """The decode module with these parameters in the compute dtype, for evaluation and saving.

    An adapter's module has, beside the adapter, `base_params`, the base's arrays of each layer.
    """
    mesh = objective.mesh
    assert isinstance(mesh, Mesh), "an abstract mesh has no arrays"
    trained = cast_params(unstack_layers(trainable, objective.config, mesh), objective.compute_dtype)
    return DecodeModule(objective.architecture, {**(base_params or {}), **trained}, mesh)
