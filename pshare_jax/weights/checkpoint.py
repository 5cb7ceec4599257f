"""The interface of all weight readers: an opened model source with Hugging Face names, whatever its file format.

`sources.open_source` returns a `Checkpoint`; `load` turns its tensors into parameters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from pshare_jax.text.tokenizer import Tokenizer


@runtime_checkable
class Checkpoint(Protocol):
    """An opened folder or file with a model's config, tensors and tokenizer."""

    @property
    def path(self) -> Path:
        """The folder or file, for messages and caches."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json; for a GGUF file the same fields, derived from its metadata."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The content of generation_config.json; empty if the file is missing."""
        ...

    @property
    def has_tokenizer(self) -> bool:
        """Whether the source has a tokenizer."""
        ...

    def names(self) -> list[str]:
        """Hugging Face tensor names ("model.layers.0.self_attn.q_proj.weight"), in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape in Hugging Face orientation, without reading it."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor as a new array, [out, in], in Hugging Face row order: float32, float16, bfloat16, or a quantised form
        (model/quantization.py).
        """
        ...

    def tokenizer(self) -> "Tokenizer":
        """The source's tokenizer."""
        ...
