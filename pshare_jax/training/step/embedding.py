"""The embedding's lookup on a mesh that splits a batch's rows.

Left to the partitioner, the embedding's split over `fsdp`, that of the hidden size, goes through all layers, and each device
computes all rows; or each device looks up the rows of all.
"""

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from pshare_jax.mesh import FSDP, by_rows
from pshare_jax.training.step.mesh import row_axes


def embedding_rows(
    weight: Float[Array, "V D"], tokens: Int[Array, "B T"], mesh: Mesh | AbstractMesh, dtype: str
) -> Float[Array, "B T D"]:
    """`weight[tokens]` in `dtype`, split by rows as the tokens are.

    Where `fsdp` splits the weight's columns, each device looks up its columns for the tokens of its `fsdp` group, and sends
    to each device of the group what belongs to its rows. That moves less than the weight's columns would, and the gradients of
    repeated tokens are summed in the weight's own dtype.
    """
    axes = row_axes(mesh)
    split = FSDP in axes and weight.shape[1] % mesh.shape[FSDP] == 0

    def lookup(weight: Array, tokens: Array) -> Array:
        if not split:
            return weight[tokens].astype(dtype)
        together = jax.lax.all_gather(tokens, FSDP, axis=0, tiled=True)
        columns = weight[together].astype(dtype)
        return jax.lax.all_to_all(columns, FSDP, split_axis=0, concat_axis=2, tiled=True)

    specs = (PartitionSpec(None, FSDP) if split else PartitionSpec(), PartitionSpec(axes))
    return by_rows(lookup, mesh, axes, specs, PartitionSpec(axes))(weight, tokens)
