"""Meshes with the axes `model` (tensor parallelism) and, in training, `fsdp`; model/sharding.py shards over them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pshare_jax.errors import PshareError

MODEL = "model"
FSDP = "fsdp"
"""Training's second axis: each matrix is also split along its other dimension."""
REPLICATED = PartitionSpec()


def virtual_cpu_devices(count: int) -> None:
    """Split the CPU into `count` devices. Call it before JAX's backend starts; GPU and TPU devices are not affected."""
    jax.config.update("jax_num_cpu_devices", count)


def make_mesh(device_ids: Sequence[int]) -> Mesh:
    """A mesh along the axis `model` of devices, given by index in `jax.devices()`; their number is the tp degree."""
    devices = jax.devices()
    wrong = [i for i in device_ids if not 0 <= i < len(devices)]
    if wrong:
        raise PshareError(f"there is no device {wrong[0]}; JAX has devices 0 to {len(devices) - 1}.")
    if not device_ids or len(set(device_ids)) != len(device_ids):
        raise PshareError(f"a mesh needs one or more different devices, not {list(device_ids)}.")
    return Mesh(np.array([devices[i] for i in device_ids]), (MODEL,))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of tokens, positions and logits: whole on every device."""
    return NamedSharding(mesh, REPLICATED)


def by_rows(
    function: Callable, mesh: Mesh | AbstractMesh, axes: tuple[str, ...], in_specs: Any, out_specs: Any
) -> Callable:
    """`function` on each device's own part along `axes`; without axes, as it is. Other axes are left to the partitioner."""
    if not axes:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False
    )


def same_devices(first: Mesh, second: Mesh) -> bool:
    """Whether two meshes have the same devices in the same order."""
    return math.prod(first.shape.values()) == math.prod(second.shape.values()) and bool(
        np.array_equal(first.devices, second.devices)
    )
