"""The training mesh: `data` and `fsdp` split the rows of a batch, `fsdp` and `model` parameters and optimizer state.

Parameters follow the table of `model/sharding.py`; XLA's partitioner inserts the collectives.
"""

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pshare_jax.errors import PshareError
from pshare_jax.mesh import FSDP, MODEL
from pshare_jax.training.config import MeshConfig
from pshare_jax.training.data.batches import OneStreamBatch, TwoStreamBatch

DATA = "data"


def training_mesh(config: MeshConfig) -> Mesh:
    """The mesh over JAX's first `config.size` devices.

    Raises:
        PshareError: JAX has fewer devices.
    """
    devices = jax.devices()
    if config.size > len(devices):
        raise PshareError(
            f"mesh.data * mesh.fsdp * mesh.tensor = {config.size}, but JAX has {len(devices)}; use a smaller mesh."
        )
    shape = (config.data, config.fsdp, config.tensor)
    return Mesh(np.array(devices[: config.size]).reshape(shape), (DATA, FSDP, MODEL))


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes with more than one device that split a batch's rows."""
    return tuple(axis for axis in (DATA, FSDP) if mesh.shape.get(axis, 1) > 1)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh without devices, sufficient for shardings and sizes; this machine may have fewer devices."""
    return AbstractMesh((config.data, config.fsdp, config.tensor), (DATA, FSDP, MODEL))


def step_compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, str]:
    """XLA's options for a training step. XLA's default on CPU schedules for concurrency and keeps the intermediates of
    many layers at once, which defeats rematerialisation; it is set to schedule for memory.
    """
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else {}


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def shard_batch(batch: TwoStreamBatch | OneStreamBatch, mesh: Mesh) -> TwoStreamBatch | OneStreamBatch:
    """The batch on the mesh's devices."""
    return jax.device_put(batch, batch_sharding(mesh))
