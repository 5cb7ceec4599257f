"""JAX's persistent compilation cache: a later server or training run reuses the compiled programs."""

from pathlib import Path

import jax

from pshare_jax.weights.sources import default_cache_dir


def cache_folder() -> Path:
    """The folder of compiled programs, beside the downloaded models."""
    return default_cache_dir() / "xla"


def keep_programs(folder: Path) -> None:
    """Cache every compiled program in `folder`."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
