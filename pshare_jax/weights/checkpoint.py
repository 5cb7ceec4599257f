"""What every weight reader offers: a model source opened for reading, in Hugging Face words whatever the file format.

`sources.open_source` returns one; `load` maps its names to parameters and its config to ModelConfig.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from pshare_jax.text.tokenizer import Tokenizer


@runtime_checkable
class Checkpoint(Protocol):
    """A folder or file with a model's config, tensors and tokenizer."""

    @property
    def path(self) -> Path:
        """The folder or file, for messages and caches."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json; for GGUF the same fields, built from the metadata."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The content of generation_config.json, empty if there is none."""
        ...

    @property
    def has_tokenizer(self) -> bool:
        """Whether the source carries a tokenizer."""
        ...

    def names(self) -> list[str]:
        """Hugging Face tensor names ("model.layers.0.self_attn.q_proj.weight"), in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in Hugging Face orientation, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, freshly read and owned by the caller: float32, float16 or bfloat16, [out, in], HF row order."""
        ...

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer that the source carries."""
        ...
