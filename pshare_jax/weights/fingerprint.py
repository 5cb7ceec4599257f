"""The base fingerprint: which weights made a KV, whatever file format, sharding or run dtype they came in.

Per-tensor hashes are taken while a model is read (`weights/load.py`) and cached beside the source, so that the next start
does not hash again.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from pshare_jax.model.config import ModelConfig

CACHE_NAME = ".pshare_hashes.json"
FORMAT = 1
"""Raised when a reader's values change, so that hashes of the old ones are forgotten."""


def tensor_hash(values: np.ndarray) -> str:
    """SHA-256 of a file tensor's values as float32 in Hugging Face orientation."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype=np.float32).data).hexdigest()


def model_fingerprint(config: ModelConfig, hashes: dict[str, str]) -> str:
    """One hash of what a model computes: the config fields that layers read and every tensor's values by our name."""
    text = json.dumps([config.layer_fields(), sorted(hashes.items())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    # Size and mtime alone survive `tar x` or `rsync -t` of other weights; inode and ctime cannot be set.
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


class HashCache:
    """Tensor hashes stored beside a model's files, valid while every weight file is the very same, unchanged."""

    def __init__(self, source: Path):
        self.file = source / CACHE_NAME if source.is_dir() else source.with_name(source.name + CACHE_NAME)
        files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
        self.state: list = [FORMAT, *([file.name, *_identity(file.stat())] for file in files)]

    def read(self) -> dict[str, str]:
        """Hashes by parameter path; empty where none are stored for the files as they are now."""
        try:
            stored = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(stored, dict) or stored.get("files") != self.state:
            return {}
        hashes = stored.get("hashes")
        if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
            return {}
        return hashes

    def write(self, hashes: dict[str, str]) -> None:
        """Store hashes; a folder that may not be written to is left alone, the next load hashes again."""
        part = self.file.with_name(self.file.name + ".part")
        try:
            part.write_text(json.dumps({"files": self.state, "hashes": hashes}))
            part.replace(self.file)
        except OSError:
            # A read-only file system refuses to remove even what is not there.
            with contextlib.suppress(OSError):
                part.unlink()
