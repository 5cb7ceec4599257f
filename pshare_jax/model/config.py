"""The config of a model's layers, read from a Hugging Face config.json in the style of transformers 4 or 5.

`ModelConfig.from_hf` is the only reader; a family is an entry of `FAMILIES`: its architectures, the defaults of fields
that real files leave out, and a few traits.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.model.quantization import weight_form
from pshare_jax.model.rope import RopeConfig, parse_rope

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")


@dataclass(frozen=True)
class LayerConfig:
    """The fields that differ between layers: a query sees `window` keys including its own (None: all earlier keys)."""

    window: int | None
    rope: RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """All numbers and switches that layers read. Hashable, so that it can be a static argument of a jitted function."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_len: int
    norm_eps: float
    activation: str
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sandwich_norms: bool
    norm_plus_one: bool
    embed_scale: float | None
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    layers: tuple[LayerConfig, ...]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a config.json object; the error for a missing or wrong field names it. How weights are quantised is read by
        `weight_form`, here only to refuse what it does not know.
        """
        weight_form(config)
        return _Reader(find_family(config), text_config(config)).read()

    def layer_fields(self) -> dict[str, Any]:
        """All fields that affect what layers compute, as plain values (for the base fingerprint)."""
        fields = dataclasses.asdict(self)
        del fields["max_len"], fields["family"]
        for layer in fields["layers"]:
            if layer["rope"]["yarn"] is None:
                # Modules made before the field existed name the fingerprint without it.
                del layer["rope"]["yarn"]
        return fields


@dataclass(frozen=True)
class Family:
    """One model family: its architectures in config.json, transformers' defaults of missing fields, and traits."""

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    defaults: Mapping[str, Any]
    qk_norm: bool = False
    gemma: bool = False
    mlp_bias: bool = False


_COMMON = {
    "max_position_embeddings": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM",),
        ("llama",),
        {**_COMMON, "max_position_embeddings": 2048, "mlp_bias": False},
        mlp_bias=True,
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        ("qwen3",),
        {
            **_COMMON,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "layer_types": None,
        },
        qk_norm=True,
    ),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "gemma3"),
        {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        qk_norm=True,
        gemma=True,
    ),
)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config.json: `text_config` of a multimodal config, else the whole."""
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return config
    # transformers keeps tying at the top level of composite configs; a nested value takes precedence.
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**tied, **nested}


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by `architectures`, else by `model_type`; an unknown family is an error."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PshareError(f"architectures in config.json must be a list of names, not {names!r}.")
    for family in FAMILIES:
        if any(name in family.architectures for name in names):
            return family
    for family in FAMILIES:
        if not names and config.get("model_type") in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    given = ", ".join(map(str, names)) or config.get("model_type") or "none"
    raise PshareError(f"unknown architecture in config.json ({given}); known architectures: {known}.")


class _Reader:
    """Reads a config.json object for one family, checking presence, type and range of every field."""

    def __init__(self, family: Family, config: Mapping[str, Any]):
        self.family, self.config = family, config

    def get(self, key: str, kind: type, optional: bool = False) -> Any:
        default = self.family.defaults.get(key)
        value = self.config.get(key, default)
        if value is None and optional:
            return None
        value = default if value is None else value
        if value is None:
            raise PshareError(f"config.json needs the field '{key}' for a {self.family.name} model.")
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise PshareError(f"{key} in config.json must be {kind.__name__}, not {value!r}.")
        if kind in (int, float) and not 0 < value < math.inf:
            raise PshareError(f"{key} in config.json must be a positive number, not {value!r}.")
        return value

    def read(self) -> ModelConfig:
        if self.family.gemma and self.config.get("use_bidirectional_attention"):
            raise PshareError("config.json has use_bidirectional_attention, but only causal models are supported.")
        hidden, num_heads = self.get("hidden_size", int), self.get("num_attention_heads", int)
        head_dim = self.get("head_dim", int, optional=self.family.name == "llama") or hidden // num_heads
        num_kv_heads = self.get("num_key_value_heads", int, optional=not self.family.gemma) or num_heads
        if num_heads % num_kv_heads:
            raise PshareError(
                f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}."
            )
        if head_dim % 2:
            raise PshareError(f"head_dim {head_dim} must be even for rotary embeddings.")
        gemma = self.family.gemma
        layers = tuple(self._layers(self.get("num_hidden_layers", int)))
        return ModelConfig(
            family=self.family.name,
            vocab_size=self.get("vocab_size", int),
            hidden_size=hidden,
            ffn_size=self.get("intermediate_size", int),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_len=self._max_len(layers),
            norm_eps=self.get("rms_norm_eps", float),
            activation=self._activation("hidden_activation" if gemma else "hidden_act"),
            tied=self.get("tie_word_embeddings", bool),
            attention_bias=self.get("attention_bias", bool),
            mlp_bias=self.family.mlp_bias and self.get("mlp_bias", bool),
            qk_norm=self.family.qk_norm,
            sandwich_norms=gemma,
            norm_plus_one=gemma,
            embed_scale=hidden**0.5 if gemma else None,
            attention_scale=(self.get("query_pre_attn_scalar", float) if gemma else float(head_dim)) ** -0.5,
            attention_softcap=self.get("attn_logit_softcapping", float, optional=True) if gemma else None,
            final_softcap=self.get("final_logit_softcapping", float, optional=True) if gemma else None,
            layers=layers,
        )

    def _max_len(self, layers: tuple[LayerConfig, ...]) -> int:
        """With yarn the length that it extends the model to, as in vLLM: Qwen3's card leaves the other field as it is."""
        extended = [int(layer.rope.factor * layer.rope.original_max_len) for layer in layers if layer.rope.yarn]
        return max(extended, default=0) or self.get("max_position_embeddings", int)

    def _activation(self, key: str) -> str:
        name = self.get(key, str)
        if name not in ACTIVATIONS:
            raise PshareError(f"activation '{name}' is not supported; known activations: {', '.join(ACTIVATIONS)}.")
        return name

    def _layers(self, num_layers: int) -> list[LayerConfig]:
        kinds = self._layer_types(num_layers)
        window = self.get("sliding_window", int, optional=True) if "sliding_attention" in kinds else None
        if "sliding_attention" in kinds and window is None:
            raise PshareError("config.json has sliding_attention layers, so it needs a sliding_window.")
        return [LayerConfig(window if kind == "sliding_attention" else None, self._rope(kind)) for kind in kinds]

    def _layer_types(self, num_layers: int) -> list[str]:
        if self.family.name == "llama":
            return ["full_attention"] * num_layers
        if self.family.name == "qwen3" and not self.get("use_sliding_window", bool):
            # transformers then drops the window, so that even sliding_attention layers see all keys.
            return ["full_attention"] * num_layers
        kinds = self.config.get("layer_types")
        if kinds is None:
            kinds = [self._default_layer_type(i) for i in range(num_layers)]
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise PshareError(
                f"layer_types in config.json must be full_attention or sliding_attention for all {num_layers} layers."
            )
        return list(kinds)

    def _default_layer_type(self, index: int) -> str:
        if self.family.gemma:
            sliding = (index + 1) % self.get("sliding_window_pattern", int) != 0
        else:
            # Not by `get`, because 0 is allowed.
            full_layers = self.config.get("max_window_layers", self.family.defaults["max_window_layers"])
            if type(full_layers) is not int:
                raise PshareError(f"max_window_layers in config.json must be int, not {full_layers!r}.")
            sliding = index >= full_layers
        return "sliding_attention" if sliding else "full_attention"

    def _rope(self, layer_type: str) -> RopeConfig:
        local = self.family.gemma and layer_type == "sliding_attention"
        key = "rope_local_base_freq" if local else "rope_theta"
        return parse_rope(
            self.config,
            layer_type,
            old_theta_key=key,
            default_theta=self.family.defaults[key],
            old_scaling=not local,
            per_layer_type=self.family.gemma,
        )
