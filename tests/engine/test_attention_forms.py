"""The setting `attention`: what auto stands for, that all weights of an engine get it, and the kernel in a whole engine."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from tiny_engine import SPLIT, Engines

import pshare_jax as ps
from pshare_jax.engine.config import EngineConfig, placed, resolve
from pshare_jax.engine.interfaces import weights_of
from pshare_jax.mesh import make_mesh
from pshare_jax.model.architecture import Architecture
from pshare_jax.model.attention.kernel import kernel_attention
from pshare_jax.model.kv.pages import empty_pages
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.model.paged_steps import paged_steps
from pshare_jax.share.mesh_base import MeshBase

PLAIN = EngineConfig(tasks={"chat": "base"})


def test_auto_is_the_kernel_on_gpus_and_plain_xla_elsewhere():
    forms = {platform: resolve(PLAIN, platform, 1).attention for platform in ("cpu", "gpu", "cuda", "rocm", "tpu")}
    assert forms == {"cpu": "xla", "gpu": "pallas", "cuda": "pallas", "rocm": "pallas", "tpu": "xla"}
    asked = dataclasses.replace(PLAIN, attention="pallas")
    assert resolve(asked, "cpu", 1).attention == "pallas"
    assert resolve(dataclasses.replace(PLAIN, attention="xla"), "gpu", 1).attention == "xla"
    with pytest.raises(
        ps.PshareError, match="pallas is a kernel for GPUs, and JAX runs on tpu; set attention to auto or xla"
    ):
        resolve(asked, "tpu", 1)


@pytest.mark.parametrize("sharing", ["shared", "isolated"])
def test_all_weights_of_an_engine_have_its_form(sources, sharing):
    base, tasks = sources
    engines = Engines(base, tasks, SPLIT, sharing=sharing)
    given = {f"{name} in memory": ps.load_module(tasks[name], engines.model) for name in ("lora", "math")}
    engine = engines.new_engine(attention="pallas", tasks={**engines.config.tasks, **given})
    weights: list[Any] = [spec.weights for spec in engine.prefill_specs]
    weights += [one for spec in engine.decode_specs for one in weights_of(spec.tasks.values())]
    assert {one.current.architecture.build.attention for one in weights} == {"pallas"}


def test_a_base_that_comes_later_has_the_engines_form(tiny_folders):
    plain: Any = ps.load(tiny_folders["llama"])
    asked = plain.with_attention("pallas")
    base = MeshBase(asked, make_mesh([3]), lambda mesh, tensors: plain.on(mesh, tensors))
    assert base.model().architecture == asked.architecture


def test_answers_with_the_kernel_on_two_devices_are_the_plain_loops(sources):
    base, tasks = sources
    engines = Engines(base, tasks, placed([[0, 1]], [[2, 3]]), attention="pallas", debug=True, rows=2)
    draw = np.random.default_rng(1)
    engines.check(*(engines.clear(draw, task, 17 + index) for index, task in enumerate(engines.config.tasks)))


def test_answers_with_the_kernel_and_windows_are_the_plain_loops(tiny_folders):
    engines = Engines(tiny_folders["gemma3"], {"chat": "base"}, attention="pallas", debug=True, rows=2)
    draw = np.random.default_rng(2)
    engines.check(engines.clear(draw, "chat", 37))


# From JAX 0.11 on.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_decode_step_with_the_kernel_has_no_loops_and_no_branches(tiny_folders, family):
    """GPUs repeat such a step from a command buffer. Each layer calls one kernel; the loops of plain XLA stay on the host."""
    model = ps.load(tiny_folders[family])
    rows, slots = 4, 4
    pages = empty_pages(model.config, 8, 16, "float32", model.mesh)
    batch = DecodeBatch.empty(np.zeros(slots + 1, np.int32), rows, slots)
    tables = np.zeros((slots + 1, 32), np.int32)

    def operations(architecture: Architecture, attention_fn=None):
        step: Any = paged_steps(architecture, model.mesh, attention_fn).decode
        lowered = step.trace(model.params, batch, tables, pages).lower(lowering_platforms=("cuda",))
        return re.findall(r"stablehlo\.(?:while|case|if)\b|xla\.gpu\.triton", lowered.as_text())

    kernel = kernel_attention(model.mesh, interpret=False)
    assert operations(model.architecture, kernel) == ["xla.gpu.triton"] * len(model.config.layers)
    assert operations(model.architecture).count("stablehlo.while") >= len(model.config.layers)
