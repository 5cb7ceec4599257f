"""The shardings of parameters and KV over a mesh's `model` axis and, in training, its `fsdp` axis.

Standard tensor parallelism: q, k, v, gate and up by columns, o and down by rows, embedding and head by vocabulary, KV
by kv heads. XLA's partitioner derives the shardings of all intermediate values.
"""

import re

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pshare_jax.errors import PshareError
from pshare_jax.mesh import FSDP, MODEL, REPLICATED
from pshare_jax.model.config import ModelConfig

COLUMNS, ROWS = PartitionSpec(None, MODEL), PartitionSpec(MODEL, None)

# (pattern of parameter paths, sharding): the first match applies; a path without a match is an error.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding\.weight", ROWS),
    (r"head", COLUMNS),
    (r".*norm\.weight", REPLICATED),
    # The scales of quantised kernels are [1, out].
    (r".*\.(q|k|v|gate|up)\.(kernel|kernel_scale|lora_b)", COLUMNS),
    (r".*\.(q|k|v|gate|up)\.bias", PartitionSpec(MODEL)),
    (r".*\.(q|k|v|gate|up)\.lora_a", REPLICATED),
    (r".*\.(o|down)\.(kernel|lora_a)", ROWS),
    (r".*\.(o|down)\.(bias|kernel_scale|lora_b)", REPLICATED),
    # Stacked adapters: A is [slots, rank, in], B [slots, rank, out].
    (r".*\.((q|k|v|gate|up)\.stack_b|(o|down)\.stack_a)", PartitionSpec(None, None, MODEL)),
    (r".*\.((q|k|v|gate|up)\.stack_a|(o|down)\.stack_b)", REPLICATED),
)
KV_SPEC = PartitionSpec(None, MODEL, None, None)
PAGES_SPEC = PartitionSpec(MODEL, None, None, None)
CONTENT_SPEC = PartitionSpec(None, None, MODEL, None, None, None)


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Refuse a tensor-parallel degree that does not divide the model's heads or MLP."""
    if config.num_heads % tp:
        raise PshareError(
            f"tp {tp} does not divide the model's {config.num_heads} query heads; choose a degree that does."
        )
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise PshareError(f"tp {tp} must divide the model's {config.num_kv_heads} kv heads or be a multiple of them.")
    if config.ffn_size % tp:
        raise PshareError(f"tp {tp} does not divide the model's MLP size {config.ffn_size}; choose a degree that does.")


def parameter_sharding(path: str, config: ModelConfig, mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of the parameter at `path` ("layers.0.attention.q.kernel")."""
    spec = next((spec for pattern, spec in PARAMETER_RULES if re.fullmatch(pattern, path)), None)
    if spec is None:
        raise AssertionError(f"no sharding rule for parameter {path}")
    tp = mesh.shape[MODEL]
    replicated_kv = config.num_kv_heads % tp and re.fullmatch(
        r".*\.(k|v)\.(kernel|kernel_scale|lora_b|stack_b|bias)", path
    )
    # An indivisible vocabulary is replicated: padding it would add tokens that the model does not have to the logits.
    odd_vocab = config.vocab_size % tp and path in ("embedding.weight", "head")
    return NamedSharding(mesh, _also_fsdp(path, config, mesh, REPLICATED if replicated_kv or odd_vocab else spec))


def _also_fsdp(path: str, config: ModelConfig, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> PartitionSpec:
    """`spec` with the `hidden_size` axis of a matrix split over `fsdp`, if the mesh has that axis."""
    parts = mesh.shape.get(FSDP, 1)
    if parts == 1 or config.hidden_size % parts:
        return spec
    # Kernels are [in, out]: q, k, v, gate and up read the residual stream, o and down write it.
    reads = re.fullmatch(r"head|.*\.(q|k|v|gate|up)\.(kernel|lora_a)", path)
    writes = re.fullmatch(r"embedding\.weight|.*\.(o|down)\.(kernel|lora_b)", path)
    first, second = (*spec, None, None)[:2]
    if reads:
        return PartitionSpec(FSDP, second)
    return PartitionSpec(first, FSDP) if writes else spec


def kv_sharding(config: ModelConfig, mesh: Mesh) -> NamedSharding:
    """The sharding of `[B, kv_heads, S, head_dim]` keys or values: by heads, else replicated."""
    return NamedSharding(mesh, REPLICATED if config.num_kv_heads % mesh.shape[MODEL] else KV_SPEC)


def pages_sharding(config: ModelConfig, mesh: Mesh) -> NamedSharding:
    """The sharding of `[kv_heads, pages, page_size, head_dim]` pages, by heads as `kv_sharding`."""
    return NamedSharding(mesh, REPLICATED if config.num_kv_heads % mesh.shape[MODEL] else PAGES_SPEC)


def content_sharding(config: ModelConfig, mesh: Mesh) -> NamedSharding:
    """The sharding of pages' content `[layers, 2, kv_heads, pages, page_size, head_dim]`, by heads as the pages."""
    return NamedSharding(mesh, REPLICATED if config.num_kv_heads % mesh.shape[MODEL] else CONTENT_SPEC)
