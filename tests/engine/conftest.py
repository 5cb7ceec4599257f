"""Weights that all tests on real engines share, made once in a process, and a clock."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def sources(tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The tiny Llama and three tasks: itself, full weights, LoRA."""
    from faults import task_sources

    return task_sources(tiny_folders["llama"], tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def world_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Family -> its `exact_world.World`."""
    from exact_world import World

    return functools.cache(lambda family: World(family, tmp_path_factory.mktemp(family)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass: `clock(seconds)`."""
    real, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + passed[0])

    def wait(seconds: float) -> None:
        passed[0] += seconds

    return wait
