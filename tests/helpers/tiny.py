"""Tiny random models of every family, made on the spot with transformers: the weight oracle of all tests.

Weights are drawn wide (std 0.3, norms around 1) so that the models can notice a wrong or missing page of KV; config values
are odd on purpose (theta 12345, eps 1e-3, head_dim unlike hidden / heads, short windows).
"""

import json
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import write_tokenizer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = ("llama", "qwen3", "gemma3")
VOCAB = 320
_SHARED = {"vocab_size": VOCAB, "rms_norm_eps": 1e-3, "max_position_embeddings": 512, "eos_token_id": [317, 319]}


def tiny_config(family: str, **changes: Any) -> Any:
    """The transformers config of a tiny model; `changes` override fields."""
    if family == "llama":
        fields = {
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
        }
        return LlamaConfig(**{**_SHARED, **fields, **changes})
    if family == "qwen3":
        fields = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 54321.0},
        }
        return Qwen3Config(**{**_SHARED, **fields, **changes})
    fields = {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "query_pre_attn_scalar": 3,
        "sliding_window": 8,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 12345.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 321.0},
        },
    }
    return Gemma3TextConfig(**{**_SHARED, **fields, **changes})


def tiny_model(family: str, *, seed: int = 0, std: float = 0.3, **changes: Any) -> Any:
    """A random transformers model in float32: normal weights, norm weights around their neutral value, biases drawn too."""
    model_class = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "gemma3": Gemma3ForCausalLM}[family]
    model = model_class(tiny_config(family, **changes)).eval()
    redraw(model, seed, std)
    return model


def redraw(model: Any, seed: int, std: float) -> None:
    """Draw every parameter of a transformers model anew.

    Gemma multiplies its embeddings by sqrt(hidden): drawn as wide as the rest, they drown what the layers add, and a tied
    model then repeats its input whatever the context.
    """
    generator = torch.Generator().manual_seed(seed)
    gemma = "Gemma" in type(model).__name__
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name
            neutral = 0.0 if gemma or not is_norm else 1.0
            spread = 0.2 if is_norm else min(std, 0.05) if gemma and "embed_tokens" in name else std
            parameter.copy_(neutral + noise * spread)


def save_tiny(model: Any, family: str, folder: Path) -> Path:
    """Save a transformers model and the family's tiny tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder)
    write_tokenizer(folder, family, vocab_size=VOCAB)
    return folder


def tiny_folder(family: str, folder: Path, *, seed: int = 0, std: float = 0.3, **changes: Any) -> Path:
    """A tiny model's Hugging Face folder: config.json, safetensors, tokenizer."""
    return save_tiny(tiny_model(family, seed=seed, std=std, **changes), family, folder)


def tiny_module(base_folder: Path, folder: Path, *, kind: str = "full", seed: int = 1, noise: float = 0.7) -> Path:
    """A decode module folder for a tiny base: a random LoRA adapter, or the base's weights plus noise (full).

    `noise` is in units of each weight's own spread.
    """
    import jax.numpy as jnp
    import numpy as np

    import pshare_jax as ps
    from pshare_jax.model.architecture import is_lora
    from pshare_jax.model.layers import LoraConfig

    base = ps.load(base_folder)
    draw = np.random.default_rng(seed)

    def drawn(shape: tuple[int, ...], spread: float) -> Any:
        return jnp.asarray(draw.normal(0, spread, shape), jnp.float32)

    if kind == "full":
        params = {path: x + drawn(x.shape, noise * float(np.std(x))) for path, x in base.params.items()}
        module = ps.DecodeModule(base.architecture, params, base.mesh)
    else:
        lora = LoraConfig(rank=3, scale=1.5, targets=("q", "v", "o", "down"))
        architecture = base.architecture.with_lora(lora)
        new = {path: drawn(x.shape, 0.2) for path, x in architecture.shapes.items() if is_lora(path)}
        module = ps.DecodeModule(architecture, {**base.params, **new}, base.mesh)
    ps.save_module(folder, module, base)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; a value of None removes the field."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
