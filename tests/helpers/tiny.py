"""Tiny random models of every family, written as Hugging Face folders with NumPy alone.

Weights are drawn wide (std 0.3, norms around 1) so that the models can notice a wrong or missing page of KV; config values
are odd on purpose (theta 12345, eps 1e-3, head_dim unlike hidden / heads, short windows). That transformers reads the
same model from such a folder is what tests/model/test_parity.py proves.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tiny_tokenizer import write_tokenizer

VOCAB = 320
CLOSE = 1e-4
"""Absolute difference of two implementations' logits or log-probabilities."""
_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 512,
    "eos_token_id": [317, 319],
    "dtype": "float32",
}
_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 54321.0},
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "head_dim": 24,
        "query_pre_attn_scalar": 3,
        "sliding_window": 8,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 12345.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 321.0},
        },
    },
}
FAMILIES = tuple(_FIELDS)


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model; `changes` override fields."""
    config = {**_SHARED, **_FIELDS[family], **changes}
    if family == "gemma3":
        # Transformers' own pattern would need six layers for one of each kind.
        kinds = [("sliding_attention", "full_attention")[layer % 2] for layer in range(config["num_hidden_layers"])]
        config.setdefault("layer_types", kinds)
    return config


def _shapes(family: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> shape of every parameter."""
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    gemma, biased = family == "gemma3", config.get("attention_bias")
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config["vocab_size"], hidden),
        "norm.weight": (hidden,),
    }

    def linear(name: str, outputs: int, inputs: int, bias: Any) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    for layer in range(config["num_hidden_layers"]):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        for name, number in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            linear(f"{attention}.{name}_proj", number * head_dim, hidden, biased)
        linear(f"{attention}.o_proj", hidden, heads * head_dim, biased)
        for name in ("gate", "up"):
            linear(f"{mlp}.{name}_proj", middle, hidden, config.get("mlp_bias"))
        linear(f"{mlp}.down_proj", hidden, middle, config.get("mlp_bias"))
        norms = ["input", "post_attention", *(["pre_feedforward", "post_feedforward"] if gemma else [])]
        shapes |= {f"layers.{layer}.{name}_layernorm.weight": (hidden,) for name in norms}
        if family != "llama":
            shapes |= {f"{attention}.{name}_norm.weight": (head_dim,) for name in ("q", "k")}
    shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _weights(family: str, config: dict[str, Any], seed: int, std: float) -> dict[str, np.ndarray]:
    """Normal weights and biases, norm weights around their neutral value.

    Gemma multiplies its embeddings by sqrt(hidden): drawn as wide as the rest, they drown what the layers add, and a tied
    model then repeats its input whatever the context.
    """
    draw, gemma, weights = np.random.default_rng(seed), family == "gemma3", {}
    for name, shape in _shapes(family, config).items():
        is_norm = "norm" in name
        neutral = 0.0 if gemma or not is_norm else 1.0
        spread = 0.2 if is_norm else min(std, 0.05) if gemma and "embed_tokens" in name else std
        weights[name] = (neutral + spread * draw.standard_normal(shape)).astype(np.float32)
    return weights


def tiny_folder(
    family: str, folder: Path, *, seed: int = 0, std: float = 0.3, dtype: Any = np.float32, **changes: Any
) -> Path:
    """A tiny model's Hugging Face folder: config.json, safetensors, tokenizer."""
    config = tiny_config(family, **changes)
    write_tokenizer(folder, family, vocab_size=VOCAB)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = {name: array.astype(dtype) for name, array in _weights(family, config, seed, std).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_module(base_folder: Path, folder: Path, *, kind: str = "full", seed: int = 1, noise: float = 0.7) -> Path:
    """A decode module folder for a tiny base: a random LoRA adapter, or the base's weights plus noise (full).

    `noise` is in units of each weight's own spread.
    """
    import jax.numpy as jnp

    import pshare_jax as ps
    from pshare_jax.model.layers import LoraConfig
    from pshare_jax.model.quantization import dequantized

    base = ps.load(base_folder)
    if kind == "full":
        draw = np.random.default_rng(seed)
        plain = dequantized(base.params, "float32")
        noises = {path: draw.normal(0, noise * float(np.std(x)), x.shape) for path, x in plain.items()}
        params = {path: x + jnp.asarray(noises[path], jnp.float32) for path, x in plain.items()}
        module = ps.DecodeModule(base.architecture.with_weights(None), params, base.mesh)
    else:
        module = random_adapter_module(base, LoraConfig(rank=3, scale=1.5, targets=("q", "v", "o", "down")), seed)
    ps.save_module(folder, module, base)
    return folder


def random_adapter_module(base: Any, lora: Any, seed: int) -> Any:
    """A LoRA module of this shape in memory, on the base's mesh."""
    import jax

    import pshare_jax as ps
    from pshare_jax.model.architecture import is_lora
    from pshare_jax.model.sharding import parameter_sharding

    draw, architecture = np.random.default_rng(seed), base.architecture.with_lora(lora)
    new = {
        path: jax.device_put(
            draw.normal(0, 0.2, shape.shape).astype(shape.dtype), parameter_sharding(path, base.config, base.mesh)
        )
        for path, shape in architecture.shapes.items()
        if is_lora(path)
    }
    return ps.DecodeModule(architecture, {**base.params, **new}, base.mesh)


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    """Token ids over the whole tiny vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def assert_close(ours: Any, theirs: Any, tolerance: float = CLOSE) -> None:
    """Equal within an absolute tolerance; the message says by how much they differ and where."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs)
    worst = np.unravel_index(np.argmax(difference), difference.shape)
    assert difference[worst] <= tolerance, f"off by {difference[worst]:.3g} at {tuple(map(int, worst))}"


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; a value of None removes the field."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
