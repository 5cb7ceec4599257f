"""Shared by the tests of objectives: their formulas over all logits at once, turn by turn, for `objective_models`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from objective_models import InTraining, by_layer
from tiny import VOCAB

from pshare_jax.model.attention.dense import cached_attend, fresh_attend
from pshare_jax.training.config import MeshConfig
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step.guide import Guide
from pshare_jax.training.step.losses import Loss
from pshare_jax.training.step.mesh import training_mesh


def quick_jit(function: Any) -> Any:
    """jit without backend optimizations: compilation dominates the time of these tests."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def answer_logits(module: InTraining, params: Any, ids: Any, start: int, own_kv: bool) -> jax.Array:
    """The logits [n, V] of ids[start:], with dense KV of the base or, if `own_kv`, of the module itself."""
    config = module.base.config
    decoder = module.objective.architecture.bind(by_layer(module, params))
    ids, kv, first, attend = np.array(ids, np.int32)[None], (), 0, fresh_attend(config)
    if not own_kv and start > 1:
        base = module.base.architecture.bind(by_layer(module, module.base_params))
        kv = base.prefill(jnp.asarray(ids[:, : start - 1]), _range(0, start - 1), fresh_attend(config), ())
        kv = tuple((jnp.pad(k, room), jnp.pad(v, room)) for k, v in kv for room in [_room(ids.shape[1] - start)])
        first, attend = start - 1, cached_attend(config, jnp.int32(start - 1))
    hidden, _ = decoder(jnp.asarray(ids[:, first:-1]), _range(first, ids.shape[1] - 1), attend, kv)
    return decoder.logits(hidden)[0, start - 1 - first :]


def _range(first: int, end: int) -> jax.Array:
    return jnp.arange(first, end, dtype=jnp.int32)[None]


def _room(count: int) -> list[tuple[int, int]]:
    return [(0, 0), (0, 0), (0, count), (0, 0)]


def with_loss(module: InTraining, loss: Loss) -> InTraining:
    """The module with another objective."""
    return replace(module, objective=replace(module.objective, loss=loss))


def guide_of(module: InTraining, second: InTraining) -> Guide:
    """`second`, with its present parameters, as the second model of the module's objective."""
    objective = replace(module.objective, architecture=second.objective.architecture, mesh=training_mesh(MeshConfig()))
    return Guide(objective, whole(second), module.base_params)


def whole(module: InTraining) -> dict[str, jax.Array]:
    """All parameters of a module."""
    return {**module.frozen, **module.trainable}


def pairs(seed: int = 0) -> list[Sample]:
    """Samples with two answers: of different lengths, and after a prompt of one token."""
    draw = np.random.default_rng(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.integers(0, VOCAB, count).tolist())

    shapes = [(9, 4, 6), (1, 3, 2), (17, 1, 5)]
    return [
        Sample(ids(start + n), ((start, start + n),), "test", line, ids(m)) for line, (start, n, m) in enumerate(shapes)
    ]
