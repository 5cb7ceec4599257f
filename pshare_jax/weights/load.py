"""Read a model's parameters from a checkpoint, each tensor straight to its sharding, and hash the values.

`share.model` and `share.decode_module` call it. At most one tensor is in host memory beside the parameters themselves.
"""

import dataclasses
import warnings
from collections.abc import Callable
from weakref import WeakValueDictionary

import jax
import numpy as np
from jax.sharding import Mesh

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Params
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.quantization import FORMS, weight_form
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.weights.checkpoint import Checkpoint
from pshare_jax.weights.fingerprint import HashCache, tensor_hash
from pshare_jax.weights.names import HEADS, Entry, plan

Tensors = WeakValueDictionary[tuple[str, str], jax.Array]
"""The parameters on a mesh by path and hash of their values, as long as something uses them."""


def read_parameters(
    checkpoint: Checkpoint,
    config: ModelConfig,
    mesh: Mesh,
    dtype: str,
    progress: Callable[[float], None] | None = None,
    tensors: Tensors | None = None,
) -> tuple[Params, dict[str, str]]:
    """All parameters on `mesh` in `dtype`, and a hash of each tensor's values by parameter path. Quantised kernels stay in their
    form.

    `progress` is called with the fraction of tensors read, 0 to 1. Tensors that the mesh has (`tensors`, all in `dtype`) are
    taken from there; new ones are added.
    """
    tensors = Tensors() if tensors is None else tensors
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    matched = plan(config, shapes, str(checkpoint.path), weight_form(checkpoint.config))
    params: Params = {}
    cache = HashCache(checkpoint.path)
    known = cache.read()
    hashes: dict[str, str] = {}
    for count, (entry, name) in enumerate(matched.entries, start=1):
        digest, values = known.get(entry.path), None
        if digest is None:
            values = _read(checkpoint, entry, name)
            digest = tensor_hash(values)
        array = tensors.get((entry.path, digest))
        if array is None:
            values = _read(checkpoint, entry, name) if values is None else values
            array = device_put_tensor(values, entry, config, mesh, dtype)
        hashes[entry.path] = digest
        params[entry.path] = tensors[entry.path, digest] = array
        if progress:
            progress(count / len(matched.entries))
    if hashes != known:
        cache.write(hashes)
    return params, hashes


def _read(checkpoint: Checkpoint, entry: Entry, name: str) -> np.ndarray:
    """The tensor of `entry`; where kernels are quantised, only they are, so that no number is read as another."""
    values = checkpoint.read(name)
    form = entry.dtype if entry.dtype in FORMS else None
    if (values.dtype.name if values.dtype.name in FORMS else None) != form:
        raise PshareError(
            f"tensor {name} in {checkpoint.path} has dtype {values.dtype.name}, but by its config.json the dtype must be "
            f"{form or 'a floating-point one of at least 16 bits'}; download or convert the model again."
        )
    return values


def device_put_tensor(values: np.ndarray, entry: Entry, config: ModelConfig, mesh: Mesh, dtype: str) -> jax.Array:
    """One file tensor as the parameter of `entry`: transposed, cast, and on the devices in its sharding."""
    # At most one copy: casting makes the transposed view contiguous.
    cast = np.ascontiguousarray(values.T if entry.transpose else values, dtype=entry.dtype or dtype)
    return jax.device_put(cast, parameter_sharding(entry.path, config, mesh))


def settle_tying(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """The config, untied if the file has a head that differs from the embedding, as transformers does."""
    heads = [name for name in checkpoint.names() if name in HEADS]
    embeddings = [name for name in checkpoint.names() if name.endswith("embed_tokens.weight")]
    if not (config.tied and heads and embeddings):
        return config
    if np.array_equal(checkpoint.read(heads[0]), checkpoint.read(embeddings[0])):
        return config
    warnings.warn(
        f"{checkpoint.path}: config.json ties embeddings, but {heads[0]} differs from {embeddings[0]}; loading both.",
        stacklevel=2,
    )
    return dataclasses.replace(config, tied=False)
