"""FLOPs and bytes of benchmarks/device/counts.py: against XLA's own counts, and by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.device import counts, models, sizes
from benchmarks.device.cards import COMPARED, Peaks, peaks_of
from benchmarks.device.report import markdown
from benchmarks.device.training import Trainer
from pshare_jax.mesh import make_mesh
from pshare_jax.model.architecture import nbytes
from pshare_jax.model.attention.paged import gathered
from pshare_jax.model.kv.pages import page_bytes
from pshare_jax.model.paged_batch import DecodeBatch
from pshare_jax.model.paged_steps import paged_steps

PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248, "qwen3-1.7b": 1_720_574_976, "tiny": None}
"""Of the published checkpoints, norms included."""


@pytest.mark.parametrize("name", sizes.NAMES)
def test_shapes_are_those_of_the_published_models(name):
    config = sizes.shape(name)
    shapes = models.Architecture(config, models.Build("bfloat16")).shapes
    total = sum(int(np.prod(like.shape)) for like in shapes.values())
    norms = sum(like.shape[0] for path, like in shapes.items() if path.endswith("norm.weight"))
    assert total == (PARAMETERS[name] or total)
    assert counts.all_weights(config) == total - norms
    assert counts.kv_bytes(config, 2) * sizes.PAGE == page_bytes(config, sizes.PAGE, "bfloat16")


def test_flops_of_llama_8b_by_hand():
    config = sizes.shape("llama-3.1-8b")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    head = 4096 * 128_256
    one = counts.decode(config, 1, 0, 2, 0, 16)
    assert one.flops == 2 * (32 * layer + head) + 4 * 32 * 32 * 128
    assert one.num_bytes == 2 * (32 * layer + head) + 131_072
    # The last layer of a prefill computes its keys and values alone.
    chunk = counts.prefill(config, 100, 2, 2)
    assert chunk.flops == 2 * 2 * (31 * layer + 2 * 4096 * 1024) + 4 * 31 * 32 * 128 * (101 + 102)


def test_rows_and_adapters_of_a_decode_step_are_read_once_each():
    config = sizes.shape("llama-3.1-8b")
    bytes_of = {
        (rows, adapters): counts.decode(config, rows, 1000, 2, adapters, 16).num_bytes
        for rows, adapters in itertools.product((1, 32), (0, 4))
    }
    adapter = 2 * counts.adapter_weights(config, 16, sizes.TARGETS)
    assert bytes_of[1, 4] - bytes_of[1, 0] == adapter
    assert bytes_of[32, 4] - bytes_of[32, 0] == 4 * adapter
    assert bytes_of[32, 0] - bytes_of[1, 0] == 31 * 1001 * 131_072


@pytest.fixture(scope="module")
def model():
    return models.random_model(sizes.shape("tiny"), make_mesh([0]), "float32")


def test_weights_are_random_and_in_place(model):
    assert nbytes(model.params) == 4 * sum(int(np.prod(like.shape)) for like in model.architecture.shapes.values())
    kernels = {path: np.asarray(array) for path, array in model.params.items() if array.ndim == 2}
    assert all(0.5 < kernel.std() * 8 < 2 for kernel in kernels.values())
    assert len({kernel.tobytes() for kernel in kernels.values()}) == len(kernels)
    again = models.random_model(sizes.shape("tiny"), make_mesh([0]), "float32")
    assert all((np.asarray(again.params[path]) == np.asarray(array)).all() for path, array in model.params.items())


def xla_flops(step, *arguments) -> float:
    """FLOPs that XLA counts in a step without loops."""
    analysis = jax.jit(step).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def test_decode_flops_are_those_that_xla_counts(model):
    """`gathered` has no loops, and computes attention to all slots of a page table: here all are context."""
    rows, context = 4, 15 * sizes.PAGE - 1
    weights = models.with_adapters(model, 1)
    steps = paged_steps(weights.architecture, weights.mesh, gathered)
    pages = models.RandomPool(model.config, model.mesh, model.architecture.dtype, 1 + rows * 15).pages
    tables = jnp.zeros((rows + 1, 15), jnp.int32)
    batch = DecodeBatch.empty(jnp.zeros(rows + 1, jnp.int32), rows, rows)
    counted = xla_flops(lambda *all: steps.decode(*all), weights.params, batch, tables, pages)
    ours = counts.decode(model.config, rows, context, 4, 1, sizes.RANK).flops
    assert ours == pytest.approx(counted, rel=0.15)
    # XLA also counts norms, softmax and the like.
    assert ours < counted


@pytest.mark.parametrize(("method", "kind"), sizes.FULL.precision)
def test_training_flops_are_those_of_its_products(model, method, kind):
    """By hand: without attention, a token costs 2 FLOPs a weight forwards, and as much for each of its two gradients."""
    config, shape = model.config, sizes.TrainingSizes(rows=3, prompt=40, answer=10)
    layers, head = 2 * counts.layer_weights(config), counts.head_weights(config)
    full, two_streams = kind == "full", method == "prefillshare"
    ours = counts.training(config, *vars(shape).values(), two_streams=two_streams, full=full)
    passes = 3 if full else 2
    if two_streams:
        products = 10 * 2 * passes * (layers + head) + 39 * 2 * counts.prefill_weights(config)
        pairs = 3 * 2 * (10 * 39 + 55) + 39 * 40 / 2
    else:
        products = 49 * 2 * passes * layers + 10 * 2 * passes * head
        pairs = 3 * 2 * 49 * 50 / 2
    assert ours == 3 * (products + 4 * 4 * 16 * pairs)


def test_a_trainer_lowers_its_loss(model):
    """The benchmark's step is a training step."""
    trainer = Trainer(model, "prefillshare", "lora", sizes.TrainingSizes(2, 16, 8), "float32")
    losses = [float(trainer.step().loss) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


@pytest.mark.parametrize(
    ("kind", "tera", "giga"),
    [
        ("NVIDIA H200", 989, 4800),
        ("NVIDIA H100 80GB HBM3", 989, 3350),
        ("NVIDIA H100 PCIe", 756, 2000),
        ("NVIDIA A100-SXM4-40GB", 312, 1555),
        ("NVIDIA A100-SXM4-80GB", 312, 2039),
        ("NVIDIA A100 80GB PCIe", 312, 1935),
        ("NVIDIA L4", 121, 300),
        ("NVIDIA L40S", 362, 864),
        ("Tesla T4", 65, 320),
        ("TPU v4", 275, 1228),
        ("TPU v5 lite", 197, 819),
        ("TPU v5", 459, 2765),
        ("TPU v5p", 459, 2765),
        ("TPU v6 lite", 918, 1640),
    ],
)
def test_peaks_of_known_kinds(kind, tera, giga):
    assert peaks_of(kind) == Peaks(tera * 1e12, giga * 1e9)


@pytest.mark.parametrize("kind", ["cpu", "Radeon", "NVIDIA H1000"])
def test_peaks_of_other_kinds_are_unknown(kind):
    assert peaks_of(kind) == Peaks(None, None)
    assert peaks_of(kind).least_seconds(1.0, 1.0) is None


def test_the_table_has_the_limits_of_all_devices():
    """Llama-3.1-8B at 32 rows of 8k: bound by the bandwidth on both."""
    work = counts.decode(sizes.shape("llama-3.1-8b"), 32, 8192, 2, 1, 16)
    cell = {
        "name": "32 rows",
        "ms": 20.0,
        "limit_ms": 10.3,
        "share": 0.515,
        "flops": work.flops,
        "bytes": work.num_bytes,
    }
    results = {
        "card": "a card",
        "memory_gib": 130.0,
        "driver": "1.2",
        "machine": {"packages": {"jax": "0.11.2"}},
        "commit": "abc",
        "date": "2026-01-01",
        "tiny": False,
        "limits": {"flops": 989e12, "bytes_s": 4800e9},
        "parts": [
            {
                "part": "decode",
                "model": "llama-3.1-8b",
                "cells": [cell, {"name": "64 rows", "skipped": "no time is left"}],
            }
        ],
    }
    row = next(line for line in markdown(results).splitlines() if "| 32 rows |" in line)
    assert list(COMPARED) == ["H100", "v5e"]
    expected = [work.num_bytes / 3350e6, work.num_bytes / 819e6]
    assert row == f"| llama-3.1-8b | 32 rows | 20 | 10.3 | 51.5 % | {expected[0]:.4g} | {expected[1]:.4g} |"
    assert "- 64 rows, llama-3.1-8b: skipped, no time is left" in markdown(results)
