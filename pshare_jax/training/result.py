"""The result of a run: a decode module's folder, written at its end or from a checkpoint (`pshare-export`)."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.quantization import dequantized
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.share.decode_module import MANIFEST, DecodeModule, Prefill, save_module
from pshare_jax.share.model import Model, load
from pshare_jax.training.checkpoint import Checkpoints
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.config import paths_of
from pshare_jax.training.model_card import base_license, write_model_card
from pshare_jax.training.run_folder import RunFolder
from pshare_jax.training.step.objective import decode_module
from pshare_jax.training.step.static import make_objective


def export(
    root: Path,
    *,
    step: int | Literal["best"] | None = None,
    output: Path | None = None,
    merge: bool,
    dtype: str | None = None,
) -> Path:
    """Writes the decode module of a run at `step`, at its lowest held-out loss ("best"), or the last (None).

    The default `output` is module/ (with `merge` module-merged/) in the run's folder. `merge` folds LoRA into full
    weights. `dtype` is that of the files (None: the run's). Uses JAX's first device, whatever the mesh of the run.

    Raises:
        PshareError: no such run or checkpoint, another base than the run's, or nothing to merge.
    """
    run = RunFolder(root)
    config = run.read_config()
    if merge and config.module.kind == "full":
        raise PshareError("The run trains full weights, so there is nothing to merge; omit --merge.")
    with Checkpoints(run.checkpoints) as checkpoints:
        chosen = _chosen(checkpoints, step, root)
        progress, applied = checkpoints.progress(chosen), checkpoints.applied(chosen)
        base = load(config.base, dtype=dtype or (None if config.dtype == "auto" else config.dtype))
        if base.fingerprint != progress.base:
            raise PshareError(
                f"The base {config.base} has other weights than the run in {root} was trained on; restore that base."
            )
        if config.module.kind == "full":
            # Its weights are of no use beside the restored ones.
            base = replace(base, params={})
        objective = make_objective(base.architecture, config.module, base.mesh, base.architecture.dtype)
        module = decode_module(
            objective, checkpoints.restore_trainable(chosen, objective.trainable_shapes), base.params
        )
    evaluation = {} if progress.eval_loss is None else {"eval_loss": progress.eval_loss}
    info = training_info(config, chosen, applied, progress.tokens, evaluation, merged=merge)
    folder = output or root / ("module-merged" if merge else run.module.name)
    save_result(folder, merged(module, base) if merge else module, base, config, info)
    return folder


def _chosen(checkpoints: Checkpoints, step: int | str | None, root: Path) -> int:
    if not checkpoints.steps:
        raise PshareError(f"The run in {root} has no complete checkpoint; go on with pshare-train --resume.")
    if step is None:
        return checkpoints.steps[-1]
    if step == "best":
        if checkpoints.best is None:
            raise PshareError(f"The run in {root} has no checkpoint with a held-out loss; give --step a number.")
        return checkpoints.best
    if step not in checkpoints.steps:
        listed = ", ".join(map(str, checkpoints.steps))
        raise PshareError(f"The run in {root} has no checkpoint of step {step}; choose one of {listed}.")
    return int(step)


def save_result(
    folder: Path, module: DecodeModule, base: Model, config: TrainConfig, training: Mapping[str, Any]
) -> None:
    """Writes the module's folder with its model card, and replaces an older result only once the new one is complete.

    Raises:
        PshareError: the folder contains something other than a decode module, or cannot be written.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise PshareError(f"{folder} exists and is not a decode module; give another output.")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    prefill: Prefill = "base" if config.method == "prefillshare" else "own"
    try:
        save_module(part, module, base, prefill=prefill, training=training, style=config.module.style)
        write_model_card(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise PshareError(f"Cannot write the decode module to {folder}: {error.strerror or error}.") from None


def training_info(
    config: TrainConfig, step: int, applied: int, tokens: int, evaluation: Mapping[str, float], merged: bool = False
) -> dict[str, Any]:
    """The `training` field of decode_module.json, as plain values."""
    module: dict[str, Any] = {"kind": config.module.kind, "init": config.module.init}
    if config.module.kind == "lora":
        lora = config.module
        module |= {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), "dropout": lora.dropout}
        module |= {"merged": merged}
    license_fields = base_license(config.base)
    return {
        "base": config.base,
        **({"base_license": license_fields} if license_fields else {}),
        "method": config.method,
        "module": module,
        "objective": config.objective.described(),
        "data": [path for source in config.data.sources for path in paths_of(source)],
        "clock": config.data.clock,
        "steps": step,
        "applied_steps": applied,
        "trained_tokens": tokens,
        "learning_rate": config.optimizer.learning_rate,
        "seed": config.seed,
        "evaluation": dict(evaluation),
    }


def merged(module: DecodeModule, base: Model) -> DecodeModule:
    """A LoRA module as a full module: W + scale * A B, summed in float32, in the base's dtype; a quantised W is dequantised."""
    lora = module.architecture.lora
    if lora is None:
        raise PshareError("The module has full weights, so there is nothing to merge; omit --merge.")
    params = {path: x for path, x in module.params.items() if not is_lora(path)}
    params = dequantized(params, base.architecture.dtype)
    for path in [path for path in module.params if path.endswith(".lora_a")]:
        name = path.removesuffix(".lora_a")
        sharding = parameter_sharding(f"{name}.kernel", base.config, base.mesh)
        merge = jax.jit(_merged_kernel, static_argnums=3, out_shardings=sharding)
        params[f"{name}.kernel"] = merge(
            params[f"{name}.kernel"], module.params[path], module.params[f"{name}.lora_b"], lora.scale
        )
    return DecodeModule(base.architecture.with_weights(None), params, base.mesh)


def _merged_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    low_rank = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * low_rank).astype(kernel.dtype)
