"""The other side of parity tests: logits, greedy text and decode-on-base-KV computed by transformers and PEFT on CPU.

Generation takes no cache where the reference has sliding windows: transformers' cached decode gave other ids than its own
full forward pass when the prompt was longer than the window.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_config

with warnings.catch_warnings():
    # Import-time warnings of torch and transformers on new Python versions are not ours.
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from peft import PeftModel

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
HF_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
    "gemma3": transformers.Gemma3TextConfig,
}


def hf_config(family: str, **changes: Any) -> Any:
    """The tiny model's config as transformers completes it."""
    return HF_CONFIGS[family](**tiny_config(family, **changes))


def hf_model(family: str, **changes: Any) -> Any:
    """The tiny model with transformers' initial values, for names and shapes."""
    return transformers.AutoModelForCausalLM.from_config(hf_config(family, **changes))


def load_hf(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder's model as transformers reads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load_peft(base_folder: Path, adapter_folder: Path) -> Any:
    """The base with a LoRA adapter on every token, as PEFT reads it."""
    base = load_hf(base_folder)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for an attribute that was renamed there.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(base, str(adapter_folder)).eval()


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits of a full forward pass, as float32 `[B, T, V]`."""
    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.float().numpy()


def hf_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens, each from a full forward pass over everything before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(hf_logits(model, np.array([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def hf_decode_on_base(base: Any, decoder: Any, prompt: list[int], count: int) -> list[int]:
    """Our boundary rule in transformers: the base caches `prompt[:-1]`, another model goes on from the last prompt token.

    For models without sliding windows (see this module's docstring).
    """
    cache = transformers.DynamicCache()
    ids: list[int] = []
    token = prompt[-1]
    with torch.no_grad():
        if len(prompt) > 1:
            base(torch.tensor([prompt[:-1]]), cache=cache, use_cache=True)
        for _ in range(count):
            token = int(decoder(torch.tensor([[token]]), cache=cache, use_cache=True).logits[0, -1].argmax())
            ids.append(token)
    return ids
