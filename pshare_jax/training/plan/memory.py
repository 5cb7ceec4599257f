"""What training takes in memory on one device, from shapes and shardings alone. Used by the dry run; allocates nothing.

What is held from step to step is exact. Temporaries are counted (`counted_temporaries`): what a device needs that frees
each layer's intermediates as rematerialisation means it to. What XLA makes of them on a device that is there is compiled
instead (short_models.py).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from pshare_jax.mesh import FSDP, MODEL, replicated
from pshare_jax.model.attention.dense import QUERY_BLOCK
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.training.data.batches import Layout, OneStreamBatch, TwoStreamBatch, one_stream, two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step.cross_entropy import chunk_tokens
from pshare_jax.training.step.mesh import DATA, batch_sharding
from pshare_jax.training.step.objective import EMBEDDING, Objective
from pshare_jax.training.step.steps import Sums, TrainState, in_layer_order, state_shapes

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class BatchShape:
    """Rows of a batch, and what each holds: context and answer places (of `one_stream`: all places and answers' ones)."""

    layout: Layout
    rows: int
    context_len: int
    answer_len: int

    @property
    def stream_len(self) -> int:
        """Places of a row that the decode module reads."""
        return self.answer_len if self.layout == "two_stream" else self.context_len

    def arrays(self, vocab_size: int) -> TwoStreamBatch | OneStreamBatch:
        """A batch without padding: one sample a row."""
        answer = min(self.answer_len, self.stream_len)
        length = self.context_len + 1 + (answer if self.layout == "two_stream" else 0)
        ids = tuple(place % vocab_size for place in range(length))
        make = two_stream if self.layout == "two_stream" else one_stream
        sample = Sample(ids, ((length - answer, length),), "drawn", 1)
        return make([[sample]] * self.rows, self.context_len, self.answer_len)


@dataclass(frozen=True)
class StepShapes:
    """All arrays of a training step, as shapes with shardings. `base` is what the objective reads, `frozen` what the module
    does: the same arrays, or nothing. With one batch a step (`alone`) gradients are not added to a sum.
    """

    base: Shapes
    frozen: Shapes
    state: TrainState
    sums: Sums
    alone: bool
    batch: Any


def step_shapes(
    objective: Objective, optimizer: optax.GradientTransformation, batch: BatchShape, accumulation: int
) -> StepShapes:
    """The arrays of a step on the objective's mesh, as `train_steps` takes them."""
    mesh, config = objective.mesh, objective.config
    number = jax.ShapeDtypeStruct((), jnp.float32)
    base = {path: _placed(x, parameter_sharding(path, config, mesh)) for path, x in objective.base.shapes.items()}
    state = state_shapes(objective, optimizer)
    arrays = batch.arrays(config.vocab_size)
    return StepShapes(
        base=base if batch.layout == "two_stream" else {},
        frozen={} if objective.architecture.lora is None else base,
        state=state,
        sums=Sums._make([in_layer_order(state.trainable, objective), *[_placed(number, replicated(mesh))] * 3]),
        alone=accumulation == 1,
        batch=jax.tree.map(lambda x: _placed(x, batch_sharding(mesh)), arrays),
    )


def held_memory(shapes: StepShapes) -> dict[str, int]:
    """Bytes on one device of what stays from step to step, by item."""
    trained, base = device_bytes(shapes.state.trainable), shapes.base or shapes.frozen
    return {
        "base weights": device_bytes(base),
        "trained weights in float32": trained,
        "Adam's two moments, counters": device_bytes(shapes.state) - trained,
        "gradients": device_bytes(shapes.sums),
        "batch": device_bytes(shapes.batch),
    }


def counted_temporaries(objective: Objective, shapes: StepShapes, batch: BatchShape) -> dict[str, int]:
    """Bytes on one device while a batch's gradients are computed, at their most, by item."""
    config, mesh = objective.config, objective.mesh
    item, tp = jnp.dtype(objective.compute_dtype).itemsize, mesh.shape[MODEL]
    rows = batch.rows // (mesh.shape[DATA] * mesh.shape[FSDP])
    kv_heads = config.num_kv_heads if config.num_kv_heads % tp else config.num_kv_heads // tp
    two_streams = batch.layout == "two_stream"
    kv = 2 * config.num_layers * rows * batch.context_len * kv_heads * config.head_dim * item if two_streams else 0
    # Every device walks over its own rows.
    chunk = chunk_tokens(rows * batch.answer_len, config.vocab_size)
    # Logits, their exponentials and their slopes are there at once.
    logits = 3 * chunk * config.vocab_size * 4 // (tp if config.vocab_size % tp == 0 else 1)
    masters = shapes.state.trainable
    # Rows of the embedding are cast when they are looked up; as a head all of it is.
    cast = device_bytes({path: x for path, x in masters.items() if config.tied or path != EMBEDDING}) * item // 4
    return {
        "gradients before they are added": 0 if shapes.alone else device_bytes(masters),
        f"trained ones in {objective.compute_dtype}": 0 if item == 4 else cast,
        "layers' inputs": config.num_layers * rows * batch.stream_len * config.hidden_size * item,
        "base's KV": kv,
        "a layer at work": _layer_at_work(objective, batch, rows, item),
        "a chunk's logits": logits,
    }


def counted_update(shapes: StepShapes) -> int:
    """Bytes on one device while a step is applied: old and new weights and moments are there until all are known finite."""
    return 3 * device_bytes(shapes.state.trainable)


def device_bytes(tree: Any) -> int:
    """Bytes of the part of all arrays that lies on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _layer_at_work(objective: Objective, batch: BatchShape, rows: int, item: int) -> int:
    """A decode layer's intermediates and their slopes, or what a base layer has at once, whichever is more; with `fsdp`
    also a layer's gathered weights.
    """
    config, tp = objective.config, objective.mesh.shape[MODEL]
    heads, sizes = config.num_heads // tp, config.head_dim
    wide = 4 * config.hidden_size + (2 * heads * sizes + 2 * config.num_kv_heads * sizes) + 3 * config.ffn_size // tp
    keys = batch.context_len + (batch.answer_len if batch.layout == "two_stream" else 0)
    scores = rows * heads * min(QUERY_BLOCK, batch.stream_len) * keys * 4
    decode = 2 * (rows * batch.stream_len * wide * item + scores)
    base = rows * batch.context_len * wide * item + rows * heads * min(QUERY_BLOCK, batch.context_len) * keys * 4
    gathered = 0
    if objective.mesh.shape[FSDP] > 1:
        layer = [x for path, x in objective.base.shapes.items() if path.startswith("layers.0.")]
        gathered = sum(math.prod(x.shape) for x in layer) * item // tp
    return max(decode, base if batch.layout == "two_stream" else 0) + gathered


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
