"""Compiled programs are kept on disk, so that the next start of a server or a training does not compile again."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """Where compiled programs are kept (the XDG cache folder)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "pshare_jax" / "xla"


def keep_programs(folder: Path) -> None:
    """Keeps every compiled program in `folder`."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
