"""A run's objective from its config: the loss, and the second model that reads each batch first, if the loss has one.

That is distillation's teacher, or DPO's initial module. `run.py` and the dry run call it.
"""

from dataclasses import replace
from pathlib import Path

from pshare_jax.errors import PshareError
from pshare_jax.model.layer_stack import stack_layers
from pshare_jax.share.adapter_settings import is_adapter
from pshare_jax.share.decode_module import MANIFEST, DecodeModule, load_module, read_manifest
from pshare_jax.share.lora import WEIGHTS_FILE
from pshare_jax.share.model import Model
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.objective_config import ObjectiveConfig
from pshare_jax.training.start import initial_params, source_path
from pshare_jax.training.step.cross_entropy import Sft
from pshare_jax.training.step.distillation import Distillation
from pshare_jax.training.step.dpo import Dpo
from pshare_jax.training.step.guide import Guide
from pshare_jax.training.step.losses import Loss
from pshare_jax.training.step.objective import TrainableModule


def loss_of(config: ObjectiveConfig) -> Loss:
    """The loss that the config names."""
    if config.name == "distillation":
        return Distillation(config.alpha, config.temperature, config.top_k)
    return Dpo(config.beta) if config.name == "dpo" else Sft()


def load_guide(config: TrainConfig, module: TrainableModule) -> Guide | None:
    """The second model of the config's objective, on the base's mesh; an adapter shares the base's arrays.

    Raises:
        PshareError: the teacher cannot be read, or does not fit the base.
    """
    if config.objective.name == "dpo":
        params = {**module.frozen, **initial_params(config, module)}
        return Guide(module.objective, params, module.base_params if config.method == "prefillshare" else {})
    if config.objective.teacher is None:
        return None
    base = module.base
    if config.objective.teacher == config.base:
        return Guide(replace(module.objective, architecture=base.architecture), module.base_params, {})
    teacher = _teacher(config.objective.teacher, base)
    own = stack_layers(dict(teacher.params), base.config, base.mesh)
    return Guide(replace(module.objective, architecture=teacher.architecture), {**module.base_params, **own}, {})


def guide_bytes(config: TrainConfig, base_bytes: int) -> int:
    """Bytes on one device that the second model has beside the weights that training holds; `base_bytes` is a whole model's."""
    teacher, holds_base = config.objective.teacher, config.method == "prefillshare" or config.module.kind == "lora"
    if config.objective.name == "sft":
        return 0
    if teacher is not None and is_adapter(Path(teacher).expanduser()):
        return (Path(teacher).expanduser() / WEIGHTS_FILE).stat().st_size + (0 if holds_base else base_bytes)
    has_own = teacher != config.base if teacher else config.module.kind == "full" and config.module.init is not None
    return base_bytes if has_own or not holds_base else 0


def _teacher(source: str, base: Model) -> DecodeModule:
    """The teacher's module. As `base` has no weights, an adapter has only its own, and the base itself none."""
    folder = source_path(source)
    if (folder / MANIFEST).is_file() and read_manifest(folder).prefill == "base":
        raise PshareError(
            f"objective.teacher {source} was trained on the base's KV, but a teacher reads everything itself; use the module of "
            "a full_ft run or another fine-tune."
        )
    _check_vocabulary(source, folder, base)
    teacher = load_module(folder, base, prefill="own")
    if teacher.boundary.invocation:
        raise PshareError(f"objective.teacher {source} is an activated LoRA, which the base reads for; use another.")
    return teacher


def _check_vocabulary(source: str, folder: Path, base: Model) -> None:
    """A folder without a tokenizer is taken to have the base's; its number of tokens is compared when it is loaded."""
    if not (folder / "tokenizer.json").is_file():
        return
    if Tokenizer.from_folder(folder).vocabulary != base.tokenizer.vocabulary:
        raise PshareError(
            f"objective.teacher {source} has another vocabulary than the base; use a fine-tune of the base."
        )
