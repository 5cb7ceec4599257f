"""The result of a run: a decode module's folder, with a model card that says first what the module is for.

Called at the end of a run and by `pshare-export`. The folder's decode_module.json keeps what the training was and what
evaluations gave; README.md is written from it, again whenever an evaluation adds to it.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pshare_jax.errors import PshareError
from pshare_jax.model.architecture import is_lora
from pshare_jax.model.sharding import parameter_sharding
from pshare_jax.share.decode_module import MANIFEST, DecodeModule, Manifest, Prefill, read_manifest, save_module
from pshare_jax.share.model import Model
from pshare_jax.training.config import TrainConfig
from pshare_jax.training.data.bfcl import BFCL
from pshare_jax.training.data.config import paths_of

CARD_TEXT = "README.md"
RUN_ALONE = "run_alone"
"""The evaluation that the card tells first: what the module scores on its own KV, task -> accuracy."""

Reader = Literal["module", "alone", "base"]


def save_result(
    folder: Path, module: DecodeModule, base: Model, config: TrainConfig, training: Mapping[str, Any]
) -> None:
    """Writes the module's folder; an older result there is replaced when the new one is whole.

    Raises:
        PshareError: the folder holds something else.
    """
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise PshareError(f"{folder} holds something that is no decode module; give another output.")
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    prefill: Prefill = "base" if config.method == "prefillshare" else "own"
    try:
        save_module(part, module, base, prefill=prefill, training=training)
        write_model_card(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except OSError as error:
        raise PshareError(f"Cannot write the decode module to {folder}: {error.strerror or error}.") from None


def training_info(
    config: TrainConfig, step: int, applied: int, tokens: int, evaluation: Mapping[str, float], merged: bool = False
) -> dict[str, Any]:
    """What decode_module.json says of the training, as plain values."""
    module: dict[str, Any] = {"kind": config.module.kind}
    if config.module.kind == "lora":
        lora = config.module
        module |= {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets), "dropout": lora.dropout}
        module |= {"merged": merged}
    return {
        "base": config.base,
        "method": config.method,
        "module": module,
        "data": [path for source in config.data.sources for path in paths_of(source)],
        "steps": step,
        "applied_steps": applied,
        "trained_tokens": tokens,
        "learning_rate": config.optimizer.learning_rate,
        "seed": config.seed,
        "evaluation": dict(evaluation),
    }


def add_accuracy(folder: Path, task: str, accuracy: float, reader: Reader) -> None:
    """Tells a task's accuracy in a module's card: of the `module` on base KV, of it run `alone`, or of the `base`."""
    card = read_manifest(folder)
    evaluation = dict(card.training.get("evaluation", {}))
    if reader == "alone":
        evaluation[RUN_ALONE] = {**evaluation.get(RUN_ALONE, {}), task: accuracy}
    else:
        evaluation[f"accuracy{' of the base' if reader == 'base' else ''}, `{task}`"] = accuracy
    changed = replace(card, training={**card.training, "evaluation": evaluation})
    (folder / MANIFEST).write_text(json.dumps(asdict(changed), indent=2) + "\n")
    write_model_card(folder)


def merged(module: DecodeModule, base: Model) -> DecodeModule:
    """A LoRA module as a full one: W + scale * A B, summed in float32, in the base's dtype."""
    lora = module.architecture.lora
    if lora is None:
        raise PshareError("The module is a full one already; leave out --merge.")
    params = {path: x for path, x in module.params.items() if not is_lora(path)}
    for path in [path for path in module.params if path.endswith(".lora_a")]:
        name = path.removesuffix(".lora_a")
        sharding = parameter_sharding(f"{name}.kernel", base.config, base.mesh)
        add = jax.jit(_added, static_argnums=3, out_shardings=sharding)
        params[f"{name}.kernel"] = add(
            params[f"{name}.kernel"], module.params[path], module.params[f"{name}.lora_b"], lora.scale
        )
    return DecodeModule(base.architecture, params, base.mesh)


def _added(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    low_rank = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * low_rank).astype(kernel.dtype)


# --- the model card --------------------------------------------------------------------------------------------------


def write_model_card(folder: Path) -> None:
    """Writes README.md from decode_module.json."""
    card = read_manifest(folder)
    training = card.training
    evaluation = dict(training.get("evaluation", {}))
    alone = evaluation.pop(RUN_ALONE, None)
    lines = [*_purpose(card, training, alone), "", "# Decode module", ""]
    kind = "LoRA adapter in PEFT's format" if card.kind == "lora" else "full weights as a Hugging Face checkpoint"
    lines += [
        f"- Base: `{training['base']}`, fingerprint `{card.base_fingerprint[:16]}`",
        f"- Files: {kind}, and `{MANIFEST}`, by which pshare_jax knows base, tokenizer and chat template",
        f"- Training: method `{training['method']}`, {training['applied_steps']} steps, {training['trained_tokens']} "
        f"target tokens, learning rate {training['learning_rate']:g}",
        f"- Trained: {_told_module(training['module'])}",
        f"- Data: {', '.join(f'`{path}`' for path in training['data'])}",
        *_told_prompts(training["data"]),
        "",
        "## Evaluation",
        "",
        *_table(evaluation, "Nothing was measured."),
    ]
    if card.prefill == "base":
        lines += [
            "",
            "## Serve",
            "",
            "```yaml",
            f"base: {training['base']}",
            "tasks: {my-task: path/to/this/folder}",
            "```",
        ]
    (folder / CARD_TEXT).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _purpose(card: Manifest, training: Mapping[str, Any], alone: Mapping[str, Any] | None) -> list[str]:
    base = training["base"]
    if card.prefill == "own":
        return [
            f"**This is an ordinary fine-tune of `{base}`: it is meant for its own KV cache, and answers wrongly on the "
            "base's.**"
        ]
    loader = "PEFT" if card.kind == "lora" else "transformers"
    scores = "is not measured" if not alone else "is: " + ", ".join(f"{k} {_told(v)}" for k, v in alone.items())
    return [
        f"**This module is meant for the KV cache of its base `{base}`: the base reads the prompt, the module answers.** "
        f"{loader} loads the files, but run alone the module reads the prompt with its own weights, which is not what was "
        f"trained. What it scores run alone {scores}."
    ]


def _told_prompts(data: Sequence[str]) -> list[str]:
    if not any(path.startswith(BFCL) for path in data):
        return []
    return [
        "- Prompts: functions stand in a system message of their own form, `pshare_jax.training.data.bfcl.tool_messages`"
    ]


def _told_module(module: Mapping[str, Any]) -> str:
    if module["kind"] == "full":
        return "all weights"
    after = ", merged into the base's weights" if module["merged"] else ""
    return f"LoRA of rank {module['rank']}, alpha {module['alpha']:g}, on {', '.join(module['targets'])}{after}"


def _table(values: Mapping[str, Any], nothing: str) -> list[str]:
    if not values:
        return [nothing]
    return ["| what | value |", "|---|---|", *(f"| {name} | {_told(value)} |" for name, value in values.items())]


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
