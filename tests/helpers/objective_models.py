"""Shared by the tests of the objective: tiny modules in training, samples with several turns, and a reference loss.

The reference runs turn by turn with dense KV and dense attention and holds all logits: no packing, segments, blocks or
chunks.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import VOCAB, tiny_folder, tiny_module

import pshare_jax as ps
from pshare_jax.model.architecture import Params, is_lora
from pshare_jax.model.attention.dense import cached_attend, fresh_attend
from pshare_jax.model.layer_stack import stack_layers, unstack_layers
from pshare_jax.training.config import ModuleConfig
from pshare_jax.training.data.batches import one_stream, two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step.objective import TrainableModule, init_trainable, trainable_module
from pshare_jax.training.step.static import Objective

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "qwen3": {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1},
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}
# (length, turns): one turn and several, a one-token prompt, turns that touch, longer than gemma's window.
SHAPES = [(23, ((9, 14), (17, 23))), (6, ((1, 3), (3, 6))), (31, ((28, 31),)), (12, ((2, 4), (6, 7), (9, 12)))]


def shape_of(kind: Any, **fields: Any) -> ModuleConfig:
    """A small module config."""
    return ModuleConfig(**{"kind": kind, "rank": 4, "alpha": 6.0, "targets": ("q", "v", "down"), **fields})


@dataclass(frozen=True)
class InTraining(TrainableModule):
    """A trainable module together with its trainable parameters."""

    trainable: Params = field(default_factory=dict)


def fresh(base: ps.Model, method: Any, config: ModuleConfig, dtype: str, seed: int = 0) -> InTraining:
    """With initial parameters."""
    module = trainable_module(base, method, config, dtype)
    values = {path: x.astype(jnp.float32) for path, x in init_trainable(module, seed).items()}
    return InTraining(**module.__dict__, trainable=values)


class BaseWithModules:
    """A base with a full and a LoRA module whose weights differ from it."""

    def __init__(self, family: str, folder: Path, **changes: Any):
        base = tiny_folder(family, folder / "base", std=0.1, **{**SMALL[family], **changes})
        self.modules = {kind: tiny_module(base, folder / kind, kind=kind, noise=0.3) for kind in ("full", "lora")}
        self.family, self.folder, self.base = family, base, ps.load(base)
        self.shared = ps.factorize(self.base)
        for kind, module in self.modules.items():
            self.shared.add_task(kind, module)

    def module(self, kind: str, method: Any = "prefillshare", **fields: Any) -> InTraining:
        """The saved module of this kind, in training."""
        module = self.shared.task_modules.module(kind)
        whole = kind == "full"
        trainable = {path: x for path, x in module.params.items() if whole or is_lora(path)}
        objective = Objective(self.base.architecture, module.architecture, self.base.mesh, "float32", **fields)
        base = self.stacked(self.base.params)
        return InTraining(self.base, objective, method, base, {} if whole else base, self.stacked(trainable))

    def stacked(self, params: Params) -> Params:
        """The arrays in stacks."""
        return stack_layers(dict(params), self.base.config, self.base.mesh)


def samples(seed: int = 0) -> list[Sample]:
    """One sample of each shape."""
    draw = np.random.default_rng(seed)
    return [
        Sample(tuple(draw.integers(0, VOCAB, length).tolist()), turns, "test", line)
        for line, (length, turns) in enumerate(SHAPES)
    ]


def packed(layout: str, rows: list[list[Sample]]) -> Any:
    """A batch with some padding."""
    return two_stream(rows, 48, 24) if layout == "two_stream" else one_stream(rows, 64, 24)


def by_layer(module: TrainableModule, params: Params) -> Params:
    """The arrays of each layer."""
    return unstack_layers(params, module.objective.config, module.base.mesh)


def reference_nll(module: InTraining, trainable: Any, sample: Sample) -> jax.Array:
    """-log p of all answers of a sample, turn by turn."""
    config = module.base.config
    decoder = module.objective.architecture.bind(by_layer(module, {**module.frozen, **trainable}))
    ids, total = np.array(sample.ids, np.int32)[None], jnp.float32(0)
    for start, end in sample.turns:
        kv: Any = ()
        if module.method == "prefillshare" and start > 1:
            base = module.base.architecture.bind(by_layer(module, module.base_params))
            positions = np.arange(start - 1, dtype=np.int32)[None]
            kv = base.prefill(jnp.asarray(ids[:, : start - 1]), jnp.asarray(positions), fresh_attend(config), ())
            # Free slots for the decode steps.
            room = [(0, 0), (0, 0), (0, end - start), (0, 0)]
            kv = tuple((jnp.pad(k, room), jnp.pad(v, room)) for k, v in kv)
            attend = cached_attend(config, jnp.int32(start - 1))
            first = start - 1
        else:
            attend, first = fresh_attend(config), 0
        positions = jnp.arange(first, end - 1, dtype=jnp.int32)[None]
        hidden, _ = decoder(jnp.asarray(ids[:, first : end - 1]), positions, attend, kv)
        logprobs = jax.nn.log_softmax(decoder.logits(hidden)[0, start - 1 - first :])
        total -= jnp.take_along_axis(logprobs, jnp.asarray(ids[0, start:end])[:, None], axis=1).sum()
    return total


def assert_gradients_agree(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Each leaf's difference relative to the leaf's largest gradient."""
    assert set(ours) == set(theirs)
    assert any(float(jnp.abs(x).max()) > 0 for x in theirs.values())
    for path, expected in theirs.items():
        largest = float(jnp.abs(expected).max())
        difference = float(jnp.abs(ours[path] - expected).max())
        assert difference <= tolerance * max(largest, 1e-6), (path, difference, largest)
