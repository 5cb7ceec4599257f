"""The trainable parameters of a run's start: those of `module.init` (a fine-tune, an adapter, a module), else the base's.

The trainer calls `initial_params`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import Params, is_lora
from pshare_jax.model.layer_stack import stack_layers, unstack_layers
from pshare_jax.model.layers import LoraConfig
from pshare_jax.model.quantization import dequantized
from pshare_jax.share.decode_module import DecodeModule, load_module
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.result import merged
from pshare_jax.training.step.objective import TrainableModule, drawn_adapter, init_trainable
from pshare_jax.weights.sources import source_folder


def initial_params(config: TrainConfig, module: TrainableModule) -> Params:
    """The parameters at step 0; the step's loss is then the score that the server gives to what `module.init` names.

    Raises:
        PshareError: `module.init` cannot be read, or does not fit the module.
    """
    source, base = config.module.init, module.base
    if source is None:
        return init_trainable(module, config.seed)
    start = load_module(source_path(source), base, prefill="own")
    if start.boundary.invocation:
        raise PshareError(
            f"module.init {source} is an activated LoRA, whose first tokens the base computes; use another."
        )
    return stack_layers(_unstacked(config, module, start), base.config, base.mesh)


def _unstacked(config: TrainConfig, module: TrainableModule, start: DecodeModule) -> dict[str, Any]:
    """The parameters of each layer."""
    if module.frozen:
        fresh = drawn_adapter(module.objective, config.seed)
        return _adapter(str(config.module.init), fresh, module.objective.architecture.lora, start)
    # `module.base` has no weights, so an adapter has only its own here, and the base itself none.
    whole = start.architecture.lora is None and start.params
    params = {**({} if whole else unstack_layers(module.base_params, start.config, start.mesh)), **start.params}
    if start.architecture.lora is None:
        return dequantized(params, module.objective.compute_dtype)
    return merged(replace(start, params=params), module.base).params


def source_path(source: str) -> Path:
    """The folder that a config names, of a hub name the downloaded one.

    Raises:
        PshareError: there is none.
    """
    path = Path(source).expanduser()
    return path if path.is_dir() else source_folder(source)


def _adapter(source: str, fresh: dict[str, np.ndarray], ours: LoraConfig | None, start: DecodeModule) -> dict[str, Any]:
    """The adapter of `start` in the shape of the module's: what it lacks is as in a new adapter, and without effect."""
    theirs = start.architecture.lora
    assert ours is not None
    if theirs is None:
        raise PshareError(f"module.init {source} has full weights, not an adapter; set module.kind: full.")
    missing = [target for target in theirs.targets if target not in ours.targets]
    if missing or theirs.rank > ours.rank:
        raise PshareError(
            f"module.init {source} has rank {theirs.rank} and the targets {', '.join(theirs.targets)}; set module.rank to at "
            "least that, and module.targets to include these."
        )
    for path, values in fresh.items():
        if path in start.params and is_lora(path):
            given = np.asarray(start.params[path], np.float32)
            if path.endswith("lora_b"):
                given = given if theirs.scale == ours.scale else given * (theirs.scale / ours.scale)
                values[: theirs.rank] = given
            else:
                values[:, : theirs.rank] = given
    return fresh
