"""Training steps on meshes: the loss of one device, rows that stay split, and collectives of weights and gradients only."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest
from tiny import tiny_folder
from tiny_runs import FULL, LORA

import pshare_jax as ps
from pshare_jax.training.config import MeshConfig, OptimizerConfig
from pshare_jax.training.data.batches import one_stream, two_stream
from pshare_jax.training.data.samples import Sample
from pshare_jax.training.step.distillation import Distillation
from pshare_jax.training.step.dpo import Dpo
from pshare_jax.training.step.guide import Guide
from pshare_jax.training.step.mesh import shard_batch, training_mesh
from pshare_jax.training.step.objective import init_trainable, trainable_module
from pshare_jax.training.step.optimizer import update_rule
from pshare_jax.training.step.steps import train_steps

# Lengths that are no other size of the tiny models, so that they mark activations in a program's text.
ROWS, CONTEXT, ANSWER = 8, 37, 19
MESHES = {
    "data": MeshConfig(data=2),
    "fsdp": MeshConfig(fsdp=4),
    "tensor": MeshConfig(tensor=2),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "wide": MeshConfig(data=2, fsdp=4),
}
# All pairs of dtype, kind, method, mesh and tied head.
CASES = [
    ("float32", FULL, "prefillshare", "fsdp", True),
    ("float32", LORA, "full_ft", "data", False),
    ("float32", FULL, "full_ft", "tensor", False),
    ("float32", LORA, "prefillshare", "all", True),
    ("float32", FULL, "full_ft", "wide", True),
    ("bfloat16", LORA, "full_ft", "fsdp", False),
    ("bfloat16", FULL, "prefillshare", "data", True),
    ("bfloat16", LORA, "prefillshare", "tensor", True),
    ("bfloat16", FULL, "full_ft", "all", False),
    ("bfloat16", LORA, "prefillshare", "wide", False),
    ("bfloat16", FULL, "prefillshare", "all", False),
    ("bfloat16", FULL, "prefillshare", "fsdp", True),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {tied: tiny_folder("llama", root / str(tied), tie_word_embeddings=tied, **sizes) for tied in (True, False)}


def samples() -> list[Sample]:
    draw = np.random.default_rng(1)
    lengths = draw.integers(5, ANSWER, ROWS)
    return [
        Sample(
            tuple(draw.integers(1, 90, CONTEXT + 1 + length).tolist()),
            ((CONTEXT + 1, CONTEXT + 1 + length),),
            "drawn",
            1,
        )
        for length in lengths.tolist()
    ]


class Step:
    """A module's first step on a mesh, and its compiled gradient program; the base is the second model of an objective that has
    one.
    """

    def __init__(self, folder: Path, dtype: str, kind: Any, method: Any, mesh: MeshConfig, loss: Any = None):
        base = ps.load(folder, dtype=dtype, mesh=training_mesh(mesh))
        module = trainable_module(base, method, kind, dtype, loss=loss)
        drawn = samples()
        if isinstance(loss, Dpo):
            # The module's answer is divided into a chosen and a rejected one.
            drawn = [
                replace(x, ids=x.ids[:-2], turns=((CONTEXT + 1, len(x.ids) - 2),), rejected=x.ids[-2:]) for x in drawn
            ]
        rows = [[sample] for sample in drawn]
        make = two_stream if module.layout == "two_stream" else one_stream
        length = CONTEXT if module.layout == "two_stream" else CONTEXT + ANSWER
        batch: Any = shard_batch(make(rows, length, ANSWER), base.mesh)
        if loss is not None:
            objective = replace(module.objective, architecture=base.architecture)
            batch = Guide(objective, module.base_params, module.base_params)(make(rows, length, ANSWER))
        steps = train_steps(module.objective, update_rule(OptimizerConfig(warmup_steps=0), 9), 0)
        state = steps.init(init_trainable(module, 0))
        arguments = (None, state.trainable, module.frozen, module.base_params, batch, np.int32(0))
        self.program = cast(Any, steps.accumulate).lower(*arguments).compile()
        self.widest = base.config.ffn_size
        self.lengths = (CONTEXT, ANSWER) if module.layout == "two_stream" else (length,)
        sums = steps.accumulate(*arguments)
        self.gradients = jax.device_get(dict(sums.gradients))
        self.state, self.result = steps.apply(state, sums)


# Beside the cases above, which are of supervised fine-tuning.
OBJECTIVES = [
    (Distillation(0.5, 2.0, None), "bfloat16", FULL, "all", True),
    (Distillation(0.5, 2.0, 4), "float32", LORA, "fsdp", False),
    (Dpo(0.5), "float32", FULL, "all", True),
]


@pytest.mark.parametrize(("loss", "dtype", "kind", "mesh", "tied"), OBJECTIVES, ids=["all", "best", "dpo"])
def test_an_objective_on_a_mesh(folders, loss, dtype, kind, mesh, tied):
    """As on one device, and no device gets hidden states, logits or signals of others' rows."""
    arguments = (folders[tied], dtype, kind, "prefillshare")
    expected, step = (Step(*arguments, each, loss) for each in (MeshConfig(), MESHES[mesh]))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert float(step.result.loss) == pytest.approx(float(expected.result.loss), rel=tolerance)
    largest = max(np.abs(x).max() for x in expected.gradients.values())
    for path, gradient in expected.gradients.items():
        assert np.abs(step.gradients[path] - gradient).max() <= 10 * tolerance * largest, path
    if MESHES[mesh].tensor == 1:
        lines = [
            x for x in step.program.as_text().splitlines() if re.search(r" (all-gather|all-reduce|reduce-scatter)\(", x)
        ]
        assert lines
        assert not [shape for line in lines for shape in shapes(line) if {CONTEXT, ANSWER} & set(shape)]


def shapes(text: str) -> list[tuple[int, ...]]:
    """The shapes of all floating-point arrays in a part of a program's text."""
    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:f32|bf16)\[([\d,]+)\]", text)]


@pytest.mark.parametrize(
    ("dtype", "kind", "method", "mesh", "tied"),
    CASES,
    ids=lambda value: (
        value
        if isinstance(value, str)
        else {FULL: "full", LORA: "lora"}.get(value, str(value))
        if not isinstance(value, bool)
        else ("tied" if value else "untied")
    ),
)
def test_a_step_on_a_mesh(folders, dtype, kind, method, mesh, tied):
    config = MESHES[mesh]
    expected, step = (Step(folders[tied], dtype, kind, method, each) for each in (MeshConfig(), config))
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
    assert float(step.result.loss) == pytest.approx(float(expected.result.loss), rel=tolerance)
    assert float(step.result.grad_norm) == pytest.approx(float(expected.result.grad_norm), rel=4 * tolerance)
    for path, gradient in expected.gradients.items():
        scale = np.abs(gradient).max() + 1e-8
        assert np.abs(step.gradients[path] - gradient).max() <= 10 * tolerance * scale, path
    text = step.program.as_text()
    if config.data * config.fsdp > 1:
        # A device looks up a part of the columns for all rows of its group, which is no more than its rows' widest activation.
        most = ROWS // (config.data * config.fsdp) * step.widest
        whole = [
            shape
            for shape in shapes(text)
            if (len(shape) == 3 and shape[1] in step.lengths and shape[0] * shape[2] > most)
            or (len(shape) > 3 and shape[0] == ROWS and set(shape) & set(step.lengths))
        ]
        assert not whole
    if config.tensor == 1:
        collectives = [
            line for line in text.splitlines() if re.search(r" (all-[a-z-]+|reduce-scatter|collective-permute)\(", line)
        ]
        assert collectives
        # But for the embedding's lookup, whose columns go to the devices of their rows: of a device's rows, a part each.
        sent = [shape for line in collectives if " all-to-all(" not in line for shape in shapes(line)]
        exchanged = [shape for line in collectives if " all-to-all(" in line for shape in shapes(line)]
        assert all(shape[0] <= ROWS // (config.data * config.fsdp) for shape in exchanged)
        assert not [shape for shape in sent if {CONTEXT, ANSWER, CONTEXT + ANSWER} & set(shape)]
