"""The training mesh: `data` and `fsdp` split the rows of a batch, `fsdp` and `model` the parameters and
their optimizer state.

Parameters follow the one table of `pshare_jax/mesh.py`; XLA's partitioner derives all sums between devices.
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
    """The mesh over JAX's first devices.

    Raises:
        PshareError: there are fewer.
    """
    devices = jax.devices()
    if config.size > len(devices):
        raise PshareError(
            f"mesh.data * mesh.fsdp * mesh.tensor = {config.size}, but JAX sees only {len(devices)} devices."
        )
    shape = (config.data, config.fsdp, config.tensor)
    return Mesh(np.array(devices[: config.size]).reshape(shape), (DATA, FSDP, MODEL))


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes that split a batch's rows."""
    return tuple(axis for axis in (DATA, FSDP) if mesh.shape.get(axis, 1) > 1)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh without devices, of which there may be fewer here: enough for shardings and sizes."""
    return AbstractMesh((config.data, config.fsdp, config.tensor), (DATA, FSDP, MODEL))


def step_compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, str]:
    """How XLA compiles a training step. On CPU it would order the program so that idle cores start early, and hold the
    intermediates of many layers at once, which rematerialisation is there to avoid: it is told to order for memory.
    """
    on_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if on_cpu else {}


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A batch's rows, split over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec((DATA, FSDP)))


def put_batch(batch: TwoStreamBatch | OneStreamBatch, mesh: Mesh) -> TwoStreamBatch | OneStreamBatch:
    """A batch on the mesh."""
    return jax.device_put(batch, batch_sharding(mesh))
