"""Decode modules with random weights, for servers that only have to be fast.

python -m benchmarks.agents_load.modules BASE lora|full FOLDER [FOLDER ...]
"""

import sys
import zlib
from pathlib import Path

import jax
import numpy as np

import pshare_jax
from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.layers import LoraConfig


def lora_module(model: pshare_jax.Model, folder: Path, seed: int) -> str:
    """The folder of a LoRA module with random weights."""
    architecture = model.architecture.with_lora(LoraConfig(8, 1.0, ("q", "v")))
    draw = np.random.default_rng(seed)
    new = {
        path: jax.numpy.asarray(draw.normal(0, 0.02, x.shape), x.dtype)
        for path, x in architecture.shapes.items()
        if is_lora(path)
    }
    module = pshare_jax.DecodeModule(architecture, {**model.params, **new}, model.mesh)
    pshare_jax.save_module(folder, module, model)
    return str(folder)


def full_module(model: pshare_jax.Model, folder: Path, seed: int) -> str:
    """The folder of a full module: the base's weights with noise of 1 % of each one's spread, so that none is equal."""
    draw = np.random.default_rng(seed)
    params = {
        path: jax.numpy.asarray(np.asarray(x) + draw.normal(0, 0.01 * float(np.std(x)), x.shape), x.dtype)
        for path, x in model.params.items()
    }
    pshare_jax.save_module(folder, pshare_jax.DecodeModule(model.architecture, params, model.mesh), model)
    return str(folder)


def main(arguments: list[str]) -> int:
    """Command line; returns the exit status."""
    base, kind, *folders = arguments
    try:
        model = pshare_jax.load(base)
    except PshareError as error:
        print(error, file=sys.stderr)
        return 2
    for folder in folders:
        make = lora_module if kind == "lora" else full_module
        # The folder's name decides the weights, whichever others are written with it.
        make(model, Path(folder), zlib.crc32(Path(folder).name.encode()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
