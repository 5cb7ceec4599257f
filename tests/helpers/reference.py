"""The other side of parity tests: logits, greedy text and decode-on-base-KV computed by transformers and PEFT on CPU.

Generation takes no cache where the reference has sliding windows: transformers' cached decode gave other ids than its own
full forward pass when the prompt was longer than the window.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tiny import VOCAB
from transformers import AutoModelForCausalLM, DynamicCache

CLOSE = 1e-4


def load_hf(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder's model as transformers reads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load_peft(base_folder: Path, adapter_folder: Path) -> Any:
    """The base with a LoRA adapter on every token, as PEFT reads it."""
    base = load_hf(base_folder)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for an attribute that was renamed there.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return PeftModel.from_pretrained(base, str(adapter_folder)).eval()


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    """Token ids over the whole tiny vocabulary."""
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def hf_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """transformers' logits of a full forward pass, as float32 `[B, T, V]`."""
    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.float().numpy()


def assert_close(ours: Any, theirs: Any, tolerance: float = CLOSE) -> None:
    """Equal within an absolute tolerance; the message says by how much they differ and where."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs)
    worst = np.unravel_index(np.argmax(difference), difference.shape)
    assert difference[worst] <= tolerance, f"off by {difference[worst]:.3g} at {tuple(map(int, worst))}"


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
    cache = DynamicCache()
    ids: list[int] = []
    token = prompt[-1]
    with torch.no_grad():
        if len(prompt) > 1:
            base(torch.tensor([prompt[:-1]]), cache=cache, use_cache=True)
        for _ in range(count):
            token = int(decoder(torch.tensor([[token]]), cache=cache, use_cache=True).logits[0, -1].argmax())
            ids.append(token)
    return ids
