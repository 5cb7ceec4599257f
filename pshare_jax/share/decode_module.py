"""Decode modules on disk: full weights as a Hugging Face checkpoint or LoRA in PEFT's format, with decode_module.json.

That manifest names the base that the module was made for and the KV it was trained on. `load_module` refuses a module
that does not fit, because its answers on another base's KV would be fluent and wrong. A folder without a manifest is served
only where its own weights compute its KV, or as an activated LoRA of PEFT, which needs none: the base computes its context.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jax

from pshare_jax.errors import PshareError
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.quantization import FORMS, WeightForm, weight_form
from pshare_jax.share.adapter_settings import INVOCATION, is_activated, is_adapter, read_settings
from pshare_jax.share.boundary import Boundary
from pshare_jax.share.lora import read_adapter, write_adapter
from pshare_jax.share.mesh_base import MeshBase
from pshare_jax.share.model import Model, Weights
from pshare_jax.share.save import save_folder
from pshare_jax.text.chat_style import ChatStyle, parse_style, style_values
from pshare_jax.weights.fingerprint import model_fingerprint
from pshare_jax.weights.load import read_parameters, settle_tying
from pshare_jax.weights.safetensors import SafetensorsFolder
from pshare_jax.weights.sources import hub_name

MANIFEST = "decode_module.json"
_STYLE = ("tool_format", "layout", "template", "text_prompt")
Kind = Literal["full", "lora"]
Prefill = Literal["base", "own"]


@dataclass(frozen=True)
class DecodeModule(Weights):
    """The weights of one task, and how it reads and writes chats (`style`). The parameters of a LoRA module are the
    base's arrays and its own A and B.

    `boundary` says where it divides prompts. An activated LoRA, whose boundary has an invocation, also has the `base`, which
    computes what it leaves.
    """

    style: ChatStyle = ChatStyle()
    boundary: Boundary = Boundary()
    base: Weights | None = None

    @property
    def encoder(self) -> Weights:
        """The weights that encode its context when every task prefills for itself."""
        return self.base or self


@dataclass(frozen=True)
class Manifest:
    """decode_module.json. `prefill` is the KV that the module was trained on; `training` is free-form information.

    `tool_format`, `layout`, `template` and `text_prompt` are the module's style (text/chat_style.py); manifests of plain
    modules lack them. `chat_template` is the hash of the base's template, `base_weights` the form of the base's kernels, if they
    are quantised.
    """

    kind: Kind
    base_fingerprint: str
    tokenizer: str
    chat_template: str
    prefill: Prefill = "base"
    training: Mapping[str, Any] = field(default_factory=dict)
    version: int = 1
    tool_format: str | Mapping[str, str] | None = None
    layout: Mapping[str, str] | None = None
    template: str | None = None
    text_prompt: str | None = None
    base_weights: WeightForm | None = None

    @property
    def style(self) -> ChatStyle:
        """How the module reads and writes chats."""
        return parse_style(self.tool_format, self.layout, template=self.template, text_prompt=self.text_prompt)

    def write(self, folder: Path) -> None:
        """Writes decode_module.json into the folder."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_module(
    folder: str | Path,
    module: Weights,
    base: Model,
    *,
    prefill: Prefill = "base",
    training: Mapping[str, Any] | None = None,
    style: ChatStyle | None = None,
) -> None:
    """Write a decode module of `base` (or `base` itself) into `folder`, created if missing: weights, then manifest.

    `style` None is the module's own. Of `training`, an adapter's files name the `base`, if it is on the hub.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # An older manifest must not describe weights that are half written.
    (folder / MANIFEST).unlink(missing_ok=True)
    style = style or (module.style if isinstance(module, DecodeModule) else ChatStyle())
    lora = module.architecture.lora
    if lora is None:
        whole = replace(base, architecture=module.architecture, params=module.params, mesh=module.mesh)
        save_folder(folder, _with_own_template(whole, style))
    else:
        invocation = module.boundary.invocation if isinstance(module, DecodeModule) else ()
        base_name = hub_name(str((training or {}).get("base", "")))
        write_adapter(folder, lora, module.params, base.config, base.class_prefix, invocation, base_name)
    manifest = Manifest(
        "full" if lora is None else "lora",
        base.fingerprint,
        base.tokenizer.fingerprint,
        base.tokenizer.template_fingerprint,
        prefill,
        training or {},
        **style_values(style),
        base_weights=base.architecture.weights,
    )
    manifest.write(folder)


def _with_own_template(model: Model, style: ChatStyle) -> Model:
    """The model with the style's template, as programs that know no manifest need it."""
    if style.template is None:
        return model
    tokenizer = model.tokenizer.with_template(style.template)
    return replace(model, tokenizer=tokenizer, stop_ids=model.stop_ids | tokenizer.turn_ends(style))


def read_manifest(folder: Path) -> Manifest:
    """Read and check decode_module.json; the error for a missing file says why serving needs it."""
    if not folder.is_dir():
        raise PshareError(f"there is no decode module folder {folder}.")
    path = folder / MANIFEST
    if not path.is_file():
        raise PshareError(
            f"{folder} has no {MANIFEST}: an ordinary fine-tune prefills with its own weights and answers wrongly on "
            "the base's KV, so only modules trained on that KV can be served with sharing: shared."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PshareError(f"{path} is not a readable decode module manifest: {error}.") from error
    if not isinstance(content, dict):
        raise PshareError(f"{path} is not a readable decode module manifest: it must contain a JSON object.")
    faults = _manifest_faults(content)
    if faults:
        raise PshareError(f"the manifest {path} is not valid: {'; '.join(faults)}.")
    return Manifest(**content)


def _manifest_faults(content: Mapping[str, Any]) -> list[str]:
    texts = ("base_fingerprint", "tokenizer", "chat_template")
    choices = {"kind": get_args(Kind), "prefill": get_args(Prefill), "version": (1,), "base_weights": FORMS}
    faults = [f"{name} is missing" for name in ("kind", *texts) if name not in content]
    for name, value in content.items():
        if name in choices and value not in choices[name]:
            faults.append(f"{name} must be {' or '.join(map(str, choices[name]))}, not {value!r}")
        elif name in texts and not isinstance(value, str):
            faults.append(f"{name} must be a string, not {value!r}")
        elif name == "training" and not isinstance(value, dict):
            faults.append(f"{name} must be an object, not {value!r}")
        elif name not in (*choices, *texts, "training", *_STYLE):
            faults.append(f"{name} is an unknown field")
    try:
        form, layout, template, text_prompt = map(content.get, _STYLE)
        parse_style(form, layout, template=template, text_prompt=text_prompt)
    except PshareError as error:
        faults.append(str(error).removesuffix("."))
    return faults


def load_module(folder: str | Path, base: Model | MeshBase, *, prefill: Prefill = "base") -> DecodeModule:
    """The decode module in `folder` on the base's mesh; a module for another base, tokenizer or prefill is an error.

    Tensors of a full module that equal the base's or another module's on that mesh are the same arrays.

    With `prefill` "own" (the isolated baseline, where the module's own weights compute its KV) any full fine-tune of
    the base's architecture and any LoRA adapter are accepted, also without a manifest or trained on the base's KV. An
    activated LoRA needs a manifest nowhere.
    """
    folder = Path(folder)
    base = MeshBase.of(base) if isinstance(base, Model) else base
    if folder.is_dir() and not (folder / MANIFEST).exists() and (prefill == "own" or is_activated(folder)):
        return _load_lora(folder, base) if is_adapter(folder) else _load_full(folder, base)
    manifest = read_manifest(folder)
    _check_manifest(manifest, folder, base.outline, prefill)
    module = _load_lora(folder, base) if manifest.kind == "lora" else _load_full(folder, base)
    return replace(module, style=manifest.style)


def base_module(base: MeshBase) -> DecodeModule:
    """The base itself as a task."""
    model = base.model()
    return DecodeModule(model.architecture, model.params, model.mesh)


def _check_manifest(manifest: Manifest, folder: Path, base: Model, prefill: Prefill) -> None:
    expected = {
        "base_fingerprint": (base.fingerprint, "another base"),
        "tokenizer": (base.tokenizer.fingerprint, "a base with another tokenizer"),
        "chat_template": (base.tokenizer.template_fingerprint, "another chat template"),
    }
    if manifest.template is not None or manifest.text_prompt is not None:
        # The base's template has no part in its prompts.
        del expected["chat_template"]
    if manifest.base_weights != base.architecture.weights:
        raise PshareError(
            f"{folder} was made for a base with {_described(manifest.base_weights)} weights, but this base's are "
            f"{_described(base.architecture.weights)}, so that its KV differs; use the base that the module was trained on, or "
            "train the module on this base."
        )
    for name, (ours, what) in expected.items():
        theirs = getattr(manifest, name)
        if theirs != ours:
            raise PshareError(
                f"{folder} was made for {what}: its {name} is {theirs[:12]}, but this base has {ours[:12]}."
            )
    try:
        base.tokenizer.turn_ends(manifest.style)
    except PshareError as error:
        raise PshareError(f"{folder} does not fit this base: {error}") from None
    if manifest.prefill == "own" and prefill == "base":
        raise PshareError(
            f"{folder} was trained with prefill 'own' and answers wrongly on the base's KV; use sharing: isolated."
        )


def _described(form: WeightForm | None) -> str:
    return form or "unquantised"


def _load_lora(folder: Path, mesh_base: MeshBase) -> DecodeModule:
    settings, base = read_settings(folder), mesh_base.model()
    lora, params = read_adapter(folder, base, settings)
    architecture, params = base.architecture.with_lora(lora), {**base.params, **params}
    if not settings.invocation:
        return DecodeModule(architecture, params, base.mesh)
    if max(settings.invocation) >= base.config.vocab_size:
        raise PshareError(f"{settings.path}: {INVOCATION} must be below the base's {base.config.vocab_size} token ids.")
    plain = Weights(base.architecture, base.params, base.mesh)
    return DecodeModule(architecture, params, base.mesh, boundary=Boundary(settings.invocation), base=plain)


def _load_full(folder: Path, mesh_base: MeshBase) -> DecodeModule:
    checkpoint, base = SafetensorsFolder(folder), mesh_base.outline
    config = settle_tying(ModelConfig.from_hf(checkpoint.config), checkpoint)
    if replace(config, tied=base.config.tied).layer_fields() != base.config.layer_fields():
        raise PshareError(
            f"the architecture in {folder}/config.json differs from the base's; a decode module must have the same."
        )
    architecture = replace(base.architecture, config=replace(config, max_len=base.config.max_len))
    architecture = architecture.with_weights(weight_form(checkpoint.config))
    dtype, tensors = base.architecture.dtype, mesh_base.tensors
    params, hashes = read_parameters(checkpoint, architecture.config, base.mesh, dtype, tensors=tensors)
    if model_fingerprint(config, hashes) == base.fingerprint:
        # With the base's parameters themselves it shares the steps of tasks that use them.
        return base_module(mesh_base)
    return DecodeModule(architecture, jax.block_until_ready(params), base.mesh)
