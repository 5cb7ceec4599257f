"""Weights that all tests on real engines share: folders and oracles are made once in a process."""

import functools
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
