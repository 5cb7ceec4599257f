"""A module trained on eight devices is served on other numbers of devices with the oracle's answers (A5-14)."""

import dataclasses

import numpy as np
import pytest
from tiny_engine import Engines
from tiny_runs import LORA, make_base_and_data, run_config

from pshare_jax.engine.config import placed
from pshare_jax.training.config import EvaluationConfig, MeshConfig
from pshare_jax.training.data.config import RowsConfig
from pshare_jax.training.run import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The base's and the module's folder."""
    root = tmp_path_factory.mktemp("served")
    base_and_data = make_base_and_data(root, num_layers=1)
    config = run_config(
        base_and_data,
        root / "run",
        module=dataclasses.replace(LORA, targets=("q", "k", "o", "up")),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        steps=2,
        evaluation=EvaluationConfig(),
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch=RowsConfig(rows=4, context_len=64), epochs=None)
    )
    train(config)
    return base_and_data[0], root / "run" / "module"


@pytest.mark.parametrize("degrees", [(2, 4), (4, 2)])
def test_on_any_devices(trained, degrees):
    base, module = trained
    devices = iter(range(8))
    prefill, decode = ([next(devices) for _ in range(degree)] for degree in degrees)
    engines = Engines(base, {"mine": module}, placed([prefill], [decode]))
    draw = np.random.default_rng(7)
    engines.check(*[engines.clear(draw, "mine", length) for length in (9, 30)])
