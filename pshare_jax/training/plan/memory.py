"""Memory of training on one device, computed from shapes and shardings; the dry run calls it. Allocates nothing.

Memory held between steps is exact. Temporaries (`estimate_temporaries`) are estimated for a device that frees each
layer's intermediates as rematerialisation intends; `short_models.py` has what XLA allocates on the present device.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding

from pshare_jax.mesh import FSDP, MODEL, replicated
from pshare_jax.model.attention.flash import KEY_BLOCK, QUERY_BLOCK
from pshare_jax.model.layer_stack import is_stack
from pshare_jax.training.data.batches import Layout, OneStreamBatch, TwoStreamBatch, one_stream, two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step.chunks import Head, chunk_tokens
from pshare_jax.training.step.losses import Guided
from pshare_jax.training.step.mesh import DATA, batch_sharding
from pshare_jax.training.step.static import EMBEDDING, HEAD, Objective
from pshare_jax.training.step.steps import Sums, TrainState, scalar_sums, state_shapes

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class BatchShape:
    """Rows of a batch, with context and answer positions (for `one_stream`: all positions, and targets)."""

    layout: Layout
    rows: int
    context_len: int
    answer_len: int

    @property
    def stream_len(self) -> int:
        """Positions of a row that the decode module reads."""
        return self.answer_len if self.layout == "two_stream" else self.context_len

    def arrays(self, vocab_size: int) -> TwoStreamBatch | OneStreamBatch:
        """A batch without padding, with one sample in each row."""
        answer = min(self.answer_len, self.stream_len)
        length = self.context_len + 1 + (answer if self.layout == "two_stream" else 0)
        ids = tuple(position % vocab_size for position in range(length))
        make = two_stream if self.layout == "two_stream" else one_stream
        sample = Sample(ids, ((length - answer, length),), "drawn", 1)
        return make([[sample]] * self.rows, self.context_len, self.answer_len)


@dataclass(frozen=True)
class StepShapes:
    """All arrays of a training step, as shapes with shardings. `base` are the weights that the base reads, `frozen`
    those that the module shares with it; either may be empty. With `single_batch` no gradients are summed. `batch` is
    `Guided` if a second model reads it first.
    """

    base: Shapes
    frozen: Shapes
    state: TrainState
    sums: Sums
    single_batch: bool
    batch: Any


def step_shapes(
    objective: Objective, optimizer: optax.GradientTransformation, batch: BatchShape, accumulation: int
) -> StepShapes:
    """The arrays of a step on the objective's mesh, as `train_steps` takes them."""
    mesh, config = objective.mesh, objective.config
    number = jax.ShapeDtypeStruct((), jnp.float32)
    base = objective.base_shapes
    state = state_shapes(objective, optimizer)
    arrays = jax.tree.map(lambda x: _placed(x, batch_sharding(mesh)), batch.arrays(config.vocab_size))
    return StepShapes(
        base=base if batch.layout == "two_stream" else {},
        frozen={} if objective.architecture.lora is None else base,
        state=state,
        sums=Sums(
            state.trainable,
            *scalar_sums(objective, lambda: _placed(number, replicated(mesh))),
        ),
        single_batch=accumulation == 1,
        batch=_guided(objective, arrays, base) if objective.loss.guide_kv else arrays,
    )


def held_memory(shapes: StepShapes) -> dict[str, int]:
    """Bytes on one device that are held between steps, by item."""
    trained, base = device_bytes(shapes.state.trainable), shapes.base or shapes.frozen
    return {
        "base weights": device_bytes(base),
        "trained weights in float32": trained,
        "optimizer state, counters": device_bytes(shapes.state) - trained,
        "gradients": device_bytes(shapes.sums),
        # The second model's head is among its weights, which the dry run counts.
        "batch": device_bytes(shapes.batch[:2] if isinstance(shapes.batch, Guided) else shapes.batch),
    }


def estimate_temporaries(objective: Objective, shapes: StepShapes, batch: BatchShape) -> dict[str, int]:
    """Peak bytes on one device while a batch's gradients are computed, by item."""
    config, mesh = objective.config, objective.mesh
    item, tp = jnp.dtype(objective.compute_dtype).itemsize, mesh.shape[MODEL]
    rows = batch.rows // (mesh.shape[DATA] * mesh.shape[FSDP])
    kv_heads = config.num_kv_heads if config.num_kv_heads % tp else config.num_kv_heads // tp
    two_streams = batch.layout == "two_stream"
    kv = 2 * config.num_layers * rows * batch.context_len * kv_heads * config.head_dim * item if two_streams else 0
    # Each device processes its own rows.
    chunk = chunk_tokens(rows * batch.answer_len, config.vocab_size)
    # Logits, their exponentials and their gradients exist at once; in distillation also the teacher's.
    logits = objective.loss.logits_arrays * chunk * config.vocab_size * 4 // (tp if config.vocab_size % tp == 0 else 1)
    masters = shapes.state.trainable
    # The embedding is cast row by row after the lookup, but as a whole if it is also the head; a layer's weights in its turn.
    outside = {path: x for path, x in masters.items() if not is_stack(path) and (config.tied or path != EMBEDDING)}
    in_layers = device_bytes({path: x for path, x in masters.items() if is_stack(path)}) // config.num_layers
    cast = (device_bytes(outside) + in_layers) * item // 4
    return {
        "gradients before summation": 0 if shapes.single_batch else device_bytes(masters),
        f"trained weights in {objective.compute_dtype}": 0 if item == 4 else cast,
        "layers' inputs": config.num_layers * rows * batch.stream_len * config.hidden_size * item,
        "base's KV": kv,
        "working set of a layer": _layer_working_set(objective, batch, rows, item),
        "logits of a chunk": logits,
    }


def estimate_update(shapes: StepShapes) -> int:
    """Bytes on one device of the largest array's update; arrays are updated one after another, in their places."""
    return max(device_bytes(x) for x in shapes.state.trainable.values())


def device_bytes(tree: Any) -> int:
    """Bytes of all arrays on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _layer_working_set(objective: Objective, batch: BatchShape, rows: int, item: int) -> int:
    """The larger of a decode layer's intermediates with their gradients and a base layer's intermediates; with `fsdp`
    plus a layer's gathered weights, with a quantised base plus its largest kernel.
    """
    config, tp = objective.config, objective.mesh.shape[MODEL]
    heads, sizes = config.num_heads // tp, config.head_dim
    wide = 4 * config.hidden_size + (2 * heads * sizes + 2 * config.num_kv_heads * sizes) + 3 * config.ffn_size // tp
    keys = batch.context_len + (batch.answer_len if batch.layout == "two_stream" else 0)
    keys = min(KEY_BLOCK, keys)
    scores = rows * heads * min(QUERY_BLOCK, batch.stream_len) * keys * 4
    decode = 2 * (rows * batch.stream_len * wide * item + scores)
    base = rows * batch.context_len * wide * item + rows * heads * min(QUERY_BLOCK, batch.context_len) * keys * 4
    layer = [x for path, x in objective.base.shapes.items() if path.startswith("layers.0.")]
    copies = sum(x.size for x in layer) * item // tp if objective.mesh.shape[FSDP] > 1 else 0
    # A quantised kernel may be a copy in the compute dtype while it is multiplied.
    copies += max(x.size for x in layer) * item // tp if objective.base.weights else 0
    return max(decode, base if batch.layout == "two_stream" else 0) + copies


def _guided(objective: Objective, batch: Any, base: Mapping[str, Any]) -> Guided:
    """The batch with the shapes of a second model's signal and head."""
    config, loss = objective.config, objective.loss
    weight = base[EMBEDDING if config.tied else HEAD]
    # The shapes are the same on one device, for which nothing is split.
    one = AbstractMesh((1,), (MODEL,))
    hidden = jax.ShapeDtypeStruct((*batch.targets.shape, config.hidden_size), objective.compute_dtype)

    def signal(weight: Any, hidden: Any, batch: Any) -> Any:
        return loss.signal(Head(weight, one, config.tied, config.final_softcap, False), hidden, batch)

    found = jax.eval_shape(signal, jax.ShapeDtypeStruct(weight.shape, weight.dtype), hidden, batch)
    placed = jax.tree.map(lambda x: _placed(x, batch_sharding(objective.mesh)), found)
    return Guided(batch, placed, weight)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
