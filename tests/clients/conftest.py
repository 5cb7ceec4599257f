"""The virtual environment of the real clients, made for the run or kept in the folder PSHARE_CLIENTS_ENV."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parent / "requirements.txt"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The folder of its executables."""
    folder = Path(os.environ.get("PSHARE_CLIENTS_ENV") or tmp_path_factory.mktemp("clients") / "env")
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", "-r", REQUIREMENTS], check=True)
        (folder / "installed").touch()
    return folder / "bin"
