"""The base fingerprint: identifies the weights that computed a KV, whatever their file format, sharding or run dtype.

`load` hashes each tensor as it reads it and caches the hashes beside the source, so that the next start skips hashing.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from pshare_jax.model.config import ModelConfig
from pshare_jax.model.quantization import FORMS

CACHE_NAME = ".pshare_hashes.json"
FORMAT = 1
"""Increment it when a reader returns other values than before, which invalidates cached hashes."""


def tensor_hash(values: np.ndarray) -> str:
    """SHA-256 of a tensor's values as float32 in Hugging Face orientation; of a quantised tensor, of its form and values."""
    if values.dtype.name in FORMS:
        return hashlib.sha256(values.dtype.name.encode() + values.tobytes()).hexdigest()
    return hashlib.sha256(np.ascontiguousarray(values, dtype=np.float32).data).hexdigest()


def model_fingerprint(config: ModelConfig, hashes: dict[str, str]) -> str:
    """The hash of everything that a model computes with: config fields that layers read, and tensor hashes by path."""
    text = json.dumps([config.layer_fields(), sorted(hashes.items())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    # `tar x` or `rsync -t` of other weights may keep size and mtime, but cannot set inode and ctime.
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


class HashCache:
    """Tensor hashes stored beside a model's files; valid until a weight file is changed or replaced."""

    def __init__(self, source: Path):
        self.file = source / CACHE_NAME if source.is_dir() else source.with_name(source.name + CACHE_NAME)
        files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
        self.state: list = [FORMAT, *([file.name, *_identity(file.stat())] for file in files)]

    def read(self) -> dict[str, str]:
        """Hashes by parameter path; empty if none are stored for the current files."""
        try:
            stored = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        hashes = stored.get("hashes") if isinstance(stored, dict) and stored.get("files") == self.state else None
        if isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values()):
            return hashes
        return {}

    def write(self, hashes: dict[str, str]) -> None:
        """Store hashes; if the folder is not writable, the next load hashes again."""
        part = self.file.with_name(self.file.name + ".part")
        try:
            part.write_text(json.dumps({"files": self.state, "hashes": hashes}))
            part.replace(self.file)
        except OSError:
            # A read-only file system raises even for a file that does not exist.
            with contextlib.suppress(OSError):
                part.unlink()
