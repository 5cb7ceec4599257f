"""A run's checkpoint becomes a decode module's folder: `pshare-export`."""

from pathlib import Path
from typing import Literal

from pshare_jax.errors import PshareError
from pshare_jax.share.model import load
from pshare_jax.training.checkpoint import Checkpoints
from pshare_jax.training.result import merged, save_result, training_info
from pshare_jax.training.run_folder import RunFolder
from pshare_jax.training.step.objective import decode_module, make_trainee


def export(
    root: Path,
    *,
    step: int | Literal["best"] | None = None,
    output: Path | None = None,
    merge: bool,
    dtype: str | None = None,
) -> Path:
    """Writes the decode module of a run at `step`, at its best held-out loss, or (None) at its last checkpoint.

    The folder is `output`, or the run's module/ (module-merged/). With `merge` LoRA becomes part of full weights. `dtype` is
    the files', absent the run's. Runs on JAX's first device, whatever mesh the run had.

    Raises:
        PshareError: there is no such run or checkpoint, the base is not the run's, or there is nothing to merge.
    """
    run = RunFolder(root)
    config = run.read_config()
    if merge and config.module.kind == "full":
        raise PshareError("The run trains full weights, so there is nothing to merge; leave out --merge.")
    with Checkpoints(run.checkpoints) as checkpoints:
        chosen = _chosen(checkpoints, step, root)
        progress, applied = checkpoints.progress(chosen), checkpoints.applied(chosen)
        base = load(config.base, dtype=dtype or (None if config.dtype == "auto" else config.dtype))
        if base.fingerprint != progress.base:
            raise PshareError(f"The base {config.base} is not the one of the run in {root}: its weights differ.")
        # What the module holds of the base is in the trainee; the rest would only take memory.
        trainee = make_trainee(base, config.method, config.module, base.architecture.dtype).without_base()
        base = trainee.base
        module = decode_module(trainee, checkpoints.restore_trainable(chosen, trainee.trained))
    evaluation = {} if progress.eval_loss is None else {"eval_loss": progress.eval_loss}
    info = training_info(config, chosen, applied, progress.tokens, evaluation, merged=merge)
    folder = output or root / ("module-merged" if merge else run.module.name)
    save_result(folder, merged(module, base) if merge else module, base, config, info)
    return folder


def _chosen(checkpoints: Checkpoints, step: int | str | None, root: Path) -> int:
    if not checkpoints.steps:
        raise PshareError(f"The run in {root} has no complete checkpoint.")
    if step is None:
        return checkpoints.steps[-1]
    if step == "best":
        if checkpoints.best is None:
            raise PshareError(f"The run in {root} has no checkpoint with a held-out loss; give --step a number.")
        return checkpoints.best
    if step not in checkpoints.steps:
        listed = ", ".join(map(str, checkpoints.steps))
        raise PshareError(f"The run in {root} has no checkpoint of step {step}; it has {listed}.")
    return int(step)
