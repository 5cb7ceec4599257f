"""Devices -> meshes with the axes `model` (tensor parallelism) and, in training, `fsdp` (model/sharding.py uses them)."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pshare_jax.errors import PshareError

MODEL = "model"
FSDP = "fsdp"
"""Training's second axis for parameters: each matrix is also split along its other dimension."""
REPLICATED = PartitionSpec()


def virtual_cpu_devices(count: int) -> None:
    """Split the CPU into `count` devices. Must run before JAX's backend starts; has no effect on GPU and TPU devices."""
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(device_ids: Sequence[int], tp: int) -> Mesh:
    """A mesh of exactly `tp` of JAX's devices, given by their index in `jax.devices()`, along the axis `model`."""
    devices = jax.devices()
    wrong = [i for i in device_ids if not 0 <= i < len(devices)]
    if wrong:
        raise PshareError(f"there is no device {wrong[0]}: JAX sees {len(devices)} of them, numbered from 0.")
    if len(set(device_ids)) != tp or len(device_ids) != tp:
        raise PshareError(f"tp {tp} needs {tp} different devices, but {list(device_ids)} were given.")
    return Mesh(np.array([devices[i] for i in device_ids]), (MODEL,))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of tokens, positions and logits: every device has all."""
    return NamedSharding(mesh, REPLICATED)


def same_devices(first: Mesh, second: Mesh) -> bool:
    """Whether two meshes are the same devices in the same order."""
    return math.prod(first.shape.values()) == math.prod(second.shape.values()) and bool(
        np.array_equal(first.devices, second.devices)
    )
