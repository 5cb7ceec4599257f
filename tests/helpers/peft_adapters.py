"""Random adapters made and saved by PEFT itself, and what PEFT computes with them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from reference import load_hf


def random_adapter(base: Path, folder: Path, *, seed: int = 0, spread: float = 0.2, **options: Any) -> Any:
    """An adapter with random A and B in `folder`, and PEFT's model with it."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.24 for an attribute that was renamed there.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        adapted = peft.get_peft_model(load_hf(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    adapted.save_pretrained(str(folder))
    return adapted


def peft_greedy(adapted: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The new ids of PEFT's own `generate`, with its cache; end tokens do not end it."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        made = adapted.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
    return made[0, len(prompt) :].tolist()
