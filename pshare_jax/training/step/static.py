"""What a training step is compiled for: the architectures of base and module on a mesh, without weights."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Architecture, is_lora
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.layer_stack import stacked_shapes, stacked_sharding
from pshare_jax.model.layers import LoraConfig
from pshare_jax.training.config import TARGETS, ModuleConfig, Remat
from pshare_jax.training.step.cross_entropy import Sft
from pshare_jax.training.step.losses import Loss

EMBEDDING, HEAD = "embedding.weight", "head"


@dataclass(frozen=True)
class Objective:
    """The loss and the architectures of base and module on one mesh (abstract if nothing is computed), without weights."""

    base: Architecture
    architecture: Architecture
    mesh: Mesh | AbstractMesh
    compute_dtype: str
    dropout: float = 0.0
    remat: Remat = "layer"
    loss: Loss = Sft()

    @property
    def config(self) -> ModelConfig:
        """The model's config, which base and module share."""
        return self.base.config

    @property
    def trainable_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and sharding of the float32 master weights: all parameters (full), or only A and B (lora). Layers are
        stacked.
        """
        whole = self.architecture.lora is None
        trained = {path: x for path, x in self.architecture.shapes.items() if whole or is_lora(path)}
        return {path: self._placed(path, x, np.float32) for path, x in stacked_shapes(trained, self.config).items()}

    @property
    def base_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and sharding of the base's weights, layers stacked."""
        stacked = stacked_shapes(self.base.shapes, self.config)
        return {path: self._placed(path, x, x.dtype) for path, x in stacked.items()}

    def _placed(self, path: str, like: jax.ShapeDtypeStruct, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, dtype, sharding=stacked_sharding(path, self.config, self.mesh))


def make_objective(
    base: Architecture,
    module: ModuleConfig,
    mesh: Mesh | AbstractMesh,
    compute_dtype: str,
    remat: Remat = "layer",
    loss: Loss | None = None,
) -> Objective:
    """The objective of a module on that base, computed in `compute_dtype`, with this loss (None: supervised fine-tuning).

    Raises:
        PshareError: no projection of the model is among the adapter's targets.
    """
    base = base.with_dtype(compute_dtype)
    return Objective(base, module_architecture(base, module), mesh, compute_dtype, module.dropout, remat, loss or Sft())


def module_architecture(base: Architecture, module: ModuleConfig) -> Architecture:
    """The architecture of the decode module: the base's without quantisation, or for LoRA the base's with an adapter.

    Raises:
        PshareError: no projection of the model is among the adapter's targets.
    """
    if module.kind == "full":
        return base.with_weights(None)
    architecture = base.with_lora(LoraConfig(module.rank, module.alpha / module.rank, tuple(module.targets)))
    if not any(map(is_lora, architecture.shapes)):
        raise PshareError(
            f"module.targets {module.targets} matches no projection of the model; use some of {', '.join(TARGETS)}."
        )
    return architecture
