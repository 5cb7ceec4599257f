"""Hugging Face tensor names <-> our parameter paths: one table for loading and saving.

All families use the same names below a prefix, so the table follows from a `ModelConfig`. Kernels are `[in, out]` here
and `[out, in]` in files. `plan` matches a file's names against the table; one error lists all faults. Adapters' tensors go
through the same prefix rules.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pshare_jax.errors import PshareError
from pshare_jax.model.config import ModelConfig
from pshare_jax.model.quantization import WeightForm, scale_path

# Prefixes of the language model in multimodal (old and new style) and in text-only repositories.
PREFIXES = ("language_model.model.", "model.language_model.", "model.")
PLAIN_PREFIX = "model."
HEADS = ("language_model.lm_head.weight", "lm_head.weight")
# Ignored: buffers in older files, and the vision part of multimodal repositories.
SKIPPED = re.compile(
    r".*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector|embed_vision)\..*|"
    r".*\.vision_model\..*"
)
PROJECTIONS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Entry:
    """One parameter: our path, the name (below `model.`, except the head) and shape in files, whether to transpose, and its dtype
    if that is not the model's.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transpose: bool = False
    dtype: str | None = None


def table(config: ModelConfig, weights: WeightForm | None = None) -> list[Entry]:
    """All parameters of a model with kernels in this form, in file order."""
    hidden = config.hidden_size
    entries = [Entry("embedding.weight", "embed_tokens.weight", (config.vocab_size, hidden))]
    for index in range(config.num_layers):
        entries += _layer(config, index, weights)
    entries.append(Entry("final_norm.weight", "norm.weight", (hidden,)))
    if not config.tied:
        entries.append(Entry("head", "lm_head.weight", (config.vocab_size, hidden), transpose=True))
    return entries


def projection_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of each projection of a layer, by its path below the layer."""
    hidden, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "attention.q": (hidden, heads),
        "attention.k": (hidden, kv),
        "attention.v": (hidden, kv),
        "attention.o": (heads, hidden),
        "mlp.gate": (hidden, config.ffn_size),
        "mlp.up": (hidden, config.ffn_size),
        "mlp.down": (config.ffn_size, hidden),
    }


def _layer(config: ModelConfig, index: int, weights: WeightForm | None) -> list[Entry]:
    layer, entries = f"layers.{index}.", []
    for path, (num_in, num_out) in projection_sizes(config).items():
        name, kernel = PROJECTIONS[path], f"{layer}{path}.kernel"
        entries.append(Entry(kernel, f"{layer}{name}.weight", (num_out, num_in), transpose=True, dtype=weights))
        if weights is not None:
            scale = f"{layer}{name}.weight_scale"
            entries.append(Entry(scale_path(kernel), scale, (num_out, 1), transpose=True, dtype="float32"))
        if config.attention_bias if path.startswith("attention") else config.mlp_bias:
            entries.append(Entry(f"{layer}{path}.bias", f"{layer}{name}.bias", (num_out,)))
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            entries.append(
                Entry(f"{layer}attention.{name}.weight", f"{layer}self_attn.{name}.weight", (config.head_dim,))
            )
    for path, name in _norms(config).items():
        entries.append(Entry(f"{layer}{path}.weight", f"{layer}{name}.weight", (config.hidden_size,)))
    return entries


def _norms(config: ModelConfig) -> dict[str, str]:
    # post_attention_layernorm is the MLP's pre-norm in families with two norms, and attention's post-norm in Gemma 3.
    if not config.sandwich_norms:
        return {"pre_attention_norm": "input_layernorm", "pre_mlp_norm": "post_attention_layernorm"}
    return {
        "pre_attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }


@dataclass(frozen=True)
class Plan:
    """Each parameter's tensor name, and the name of the redundant head in a tied model's file, if any."""

    entries: list[tuple[Entry, str]]
    extra_head: str | None


def plan(
    config: ModelConfig, shapes: dict[str, tuple[int, ...]], where: str, weights: WeightForm | None = None
) -> Plan:
    """Match a file's tensors (name -> shape) to the parameters of a model with kernels in the form `weights`; `where` names the
    source in errors.

    Raises:
        PshareError: a parameter has no, several or misshapen tensors, or a tensor is neither used nor `SKIPPED`.
    """
    found, faults = _by_short_name(shapes)
    used: list[tuple[Entry, str]] = []
    extra_head = found.pop("lm_head.weight", None) if config.tied else None
    for entry in table(config, weights):
        name = found.pop(entry.name, None)
        if name is None:
            faults.append(f"{file_name(entry)} is missing")
        elif shapes[name] != entry.shape:
            faults.append(f"{name} has shape {list(shapes[name])} instead of {list(entry.shape)}")
        else:
            used.append((entry, name))
    faults += [f"{name} belongs to no parameter" for name in found.values()]
    if faults:
        raise PshareError(f"the tensors in {where} do not match its config.json: {_listed(faults)}.")
    return Plan(used, extra_head)


def file_name(entry: Entry) -> str:
    """The entry's full name in a text-only repository."""
    return entry.name if entry.name == "lm_head.weight" else f"model.{entry.name}"


def class_prefix(config: Mapping[str, Any]) -> str:
    """The prefix of the language model's modules in the class that transformers chooses for a config.json.

    Files of multimodal models may have older names than their class, so the names in a file do not say it.
    """
    return "model.language_model." if isinstance(config.get("text_config"), Mapping) else PLAIN_PREFIX


class AdapterTensor(NamedTuple):
    """One tensor of a LoRA adapter: its name in the file, its module's prefix and name below it, lora_A or lora_B."""

    name: str
    prefix: str
    module: str
    matrix: str


def adapter_tensors(names: Iterable[str]) -> list[AdapterTensor]:
    """The tensors of an adapter that belong to the language model; a name that is no LoRA tensor's has no matrix."""
    found = []
    for name in names:
        # PEFT's own prefix may be missing, and PEFT's name of the adapter may stand before `weight`.
        inner = name.removeprefix("base_model.model.")
        if SKIPPED.fullmatch(inner):
            continue
        match = re.fullmatch(r"(.+)\.(lora_[AB])(\.[^.]+)?\.weight", inner)
        key, matrix = (match[1], match[2]) if match else (inner, "")
        module = _short_name(key)
        found.append(AdapterTensor(name, key.removesuffix(module), module, matrix))
    return found


def _short_name(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def _by_short_name(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, str], list[str]]:
    found: dict[str, str] = {}
    faults = []
    for name in shapes:
        if SKIPPED.fullmatch(name):
            continue
        short = _short_name("lm_head.weight" if name in HEADS else name)
        if short in found:
            faults.append(f"{name} and {found[short]} are the same parameter")
        found[short] = name
    return found, faults


def _listed(faults: Sequence[str], most: int = 12) -> str:
    shown = "; ".join(faults[:most])
    return shown if len(faults) <= most else f"{shown}; and {len(faults) - most} more"
