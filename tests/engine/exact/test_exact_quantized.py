"""A base in int8 and its tasks: full weights, full weights in int8, an adapter. Each answer is the plain loop's."""

import numpy as np
import pytest
from tiny import tiny_folder, tiny_module
from tiny_engine import COLOCATED, SPLIT, Engines

from pshare_jax.engine.config import placed
from pshare_jax.share.quantize import quantize

LENGTHS = (9, 30)


@pytest.fixture
def tasks(family, tmp_path):
    """The base's folder, and the sources of its tasks."""
    root = tmp_path
    quantize(tiny_folder(family, root / "plain", num_hidden_layers=2), root / "base")
    base = root / "base"
    sources = {"base": "base", "full": tiny_module(base, root / "full"), "small": root / "small"}
    quantize(root / "full", root / "small")
    return base, {**sources, "lora": tiny_module(base, root / "lora", kind="lora")}


@pytest.mark.parametrize(
    ("family", "placement", "sharing"),
    [
        ("gemma3", SPLIT, "shared"),
        ("gemma3", COLOCATED, "isolated"),
        ("llama", placed([[4, 5]], [[2, 3]]), "shared"),
    ],
    ids=["split", "isolated", "tp2"],
)
def test_every_task_answers_as_the_plain_loop(tasks, placement, sharing):
    folder, sources = tasks
    engines = Engines(folder, sources, placement, sharing=sharing, rows=4, pages=240)
    draw = np.random.default_rng(5)
    requests = [engines.clear(draw, name, length) for length in LENGTHS for name in sources]
    engines.check(*requests)
    # Again, from pages.
    engines.check(*map(engines.again, requests))
    specs = [spec for spec in engines.engine.decode_specs if "base" in spec.tasks]
    held = {path: array.dtype for spec in specs for path, array in spec.tasks["base"].params.items()}
    assert [dtype for path, dtype in held.items() if path.endswith(".kernel")] == [np.int8] * 14
