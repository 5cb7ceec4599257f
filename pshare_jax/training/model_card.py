"""The model card of a decode module (README.md), written from decode_module.json.

`result.py` writes it with the module; evaluation adds accuracies and writes it again.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from pshare_jax.share.decode_module import MANIFEST, Manifest, read_manifest
from pshare_jax.weights.sources import hub_name

CARD_TEXT = "README.md"
RUN_ALONE = "run_alone"
"""Key of the manifest's evaluation: task -> accuracy of the module on its own KV, printed in the card's first line."""

_HUB_DATA = "hf:"
_LICENSE = ("license", "license_name", "license_link")
_PLACES = {"last": "behind the history", "drop": "nowhere: it is left out"}

Reader = Literal["module", "alone", "base"]


def add_accuracy(folder: Path, task: str, accuracy: float, reader: Reader) -> None:
    """Adds a task's accuracy to manifest and card: of the `module` on base KV, of it run `alone`, or of the `base`."""
    manifest = read_manifest(folder)
    evaluation = dict(manifest.training.get("evaluation", {}))
    if reader == "alone":
        evaluation[RUN_ALONE] = {**evaluation.get(RUN_ALONE, {}), task: accuracy}
    else:
        evaluation[f"accuracy{' of the base' if reader == 'base' else ''}, `{task}`"] = accuracy
    changed = replace(manifest, training={**manifest.training, "evaluation": evaluation})
    changed.write(folder)
    write_model_card(folder)


def write_model_card(folder: Path) -> None:
    """Writes README.md from decode_module.json."""
    manifest = read_manifest(folder)
    training = manifest.training
    evaluation = dict(training.get("evaluation", {}))
    alone = evaluation.pop(RUN_ALONE, None)
    kind = "LoRA adapter in PEFT's format" if manifest.kind == "lora" else "full weights as a Hugging Face checkpoint"
    lines = [
        *("---", _metadata(manifest), "---", ""),
        _purpose(manifest, alone),
        "",
        "# Decode module",
        "",
        f"- Base: `{training['base']}`, fingerprint `{manifest.base_fingerprint[:16]}`",
        f"- Files: {kind}, and `{MANIFEST}`, by which pshare_jax knows base, tokenizer and chat template",
        f"- Training: method `{training['method']}`, {training['applied_steps']} steps, {training['trained_tokens']} "
        f"target tokens, learning rate {training['learning_rate']:g}",
        f"- Trained: {_module_summary(training['module'])}",
        *_objective_lines(training.get("objective", {})),
        f"- Data: {', '.join(f'`{path}`' for path in training['data'])}",
        *_style_lines(manifest),
        "",
        "## Evaluation",
        "",
        *_table(evaluation, "Nothing was measured."),
    ]
    if manifest.prefill == "base":
        serve = [
            "",
            "## Serve",
            "",
            "```yaml",
            f"base: {training['base']}",
            "tasks: {my-task: path/to/this/folder}",
            "```",
        ]
        lines += serve
    (folder / CARD_TEXT).write_text("\n".join(lines) + "\n", encoding="utf-8")


def base_license(source: str) -> dict[str, str]:
    """The licence that the base's card gives, as the fields of a card; empty if it gives none or there is no card.

    Of a hub model it is the card that was downloaded with the weights.
    """
    from huggingface_hub import ModelCard, errors, try_to_load_from_cache

    cached = (
        try_to_load_from_cache(name, CARD_TEXT) if (name := hub_name(source)) else Path(source).expanduser() / CARD_TEXT
    )
    if not isinstance(cached, str | Path) or not Path(cached).is_file():
        return {}
    try:
        fields = ModelCard.load(cached, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, yaml.YAMLError, errors.HFValidationError):
        return {}
    return {field: value for field in _LICENSE if isinstance(value := fields.get(field), str)}


def _metadata(manifest: Manifest) -> str:
    """The card's head, which the hub reads: YAML without its marks."""
    from huggingface_hub import ModelCardData

    training, adapter = manifest.training, manifest.kind == "lora"
    base = hub_name(training["base"])
    fields = {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    names = [path.removeprefix(_HUB_DATA).partition("?")[0] for path in training["data"] if path.startswith(_HUB_DATA)]
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["pshare_jax", *(["prefillshare"] if manifest.prefill == "base" else []), *(["lora"] if adapter else [])],
        datasets=list(dict.fromkeys(names)) or None,
        **fields,
        **training.get("base_license", {}),
    ).to_yaml()


def _purpose(manifest: Manifest, alone: Mapping[str, Any] | None) -> str:
    base = manifest.training["base"]
    if manifest.prefill == "own":
        return (
            f"**This is an ordinary fine-tune of `{base}`: it is meant for its own KV cache, and answers wrongly "
            "on the base's.**"
        )
    loader = "PEFT" if manifest.kind == "lora" else "transformers"
    scores = ", ".join(f"{task} {_format(value)}" for task, value in (alone or {}).items())
    return (
        f"**This module is meant for the KV cache of its base `{base}`: the base reads the prompt, the module "
        f"answers.** {loader} loads the files, but run alone the module reads the prompt with its own weights, which is "
        f"not what was trained. What it scores run alone is{f': {scores}' if scores else ' not measured'}."
    )


def _style_lines(manifest: Manifest) -> list[str]:
    lines = []
    if manifest.tool_format is not None:
        lines.append(f"- Function calls: in the format `{json.dumps(manifest.tool_format, ensure_ascii=False)}`")
    if manifest.style.system != "first":
        lines.append(f"- Layout: a chat's own system message stands {_PLACES[manifest.style.system]}")
    return lines


def _objective_lines(objective: Mapping[str, Any]) -> list[str]:
    """Nothing for supervised fine-tuning, the default."""
    if objective.get("name", "sft") == "sft":
        return []
    values = [f"{name} `{value}`" for name, value in objective.items() if name != "name" and value is not None]
    return [f"- Objective: {objective['name']}, {', '.join(values)}"]


def _module_summary(module: Mapping[str, Any]) -> str:
    if module["kind"] == "full":
        return "all weights"
    after = ", merged into the base's weights" if module["merged"] else ""
    return f"LoRA of rank {module['rank']}, alpha {module['alpha']:g}, on {', '.join(module['targets'])}{after}"


def _table(values: Mapping[str, Any], nothing: str) -> list[str]:
    if not values:
        return [nothing]
    return ["| what | value |", "|---|---|", *(f"| {name} | {_format(value)} |" for name, value in values.items())]


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
