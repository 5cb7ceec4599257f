"""The virtual environments of the real clients, made for the run or kept in the folder PSHARE_CLIENTS_ENV."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def executables(tmp_path_factory, name):
    """The folder of the executables of the environment of a requirements file, which is made if it is missing."""
    kept = os.environ.get("PSHARE_CLIENTS_ENV")
    folder = (Path(kept) if kept else tmp_path_factory.mktemp("clients")) / name
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", "-r", HERE / f"{name}.txt"], check=True)
        (folder / "installed").touch()
    return folder / "bin"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The folder of its executables."""
    return executables(tmp_path_factory, "requirements")


@pytest.fixture(scope="session")
def instructor_environment(tmp_path_factory):
    """Of the environment of instructor, which needs an older openai SDK than the others."""
    return executables(tmp_path_factory, "instructor")
