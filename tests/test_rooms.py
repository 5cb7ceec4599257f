"""The plan of the package: host modules import without JAX, rooms stay small, the boundary rule has one home."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pshare_jax

pytestmark = pytest.mark.host

ROOT = Path(pshare_jax.__file__).parent
DEVICE = (
    "compilation_cache",
    "mesh",
    r"model\.(?!paged_batch)",
    r"share\.(?!boundary)",
    r"weights\.(fingerprint|load|names)",
    r"sampling\.(sample|row_state|step_rows)",
    r"engine\.(build|kv\.device_pages|sampler|warmup)",
    r"server\.(startup|tasks\.loader)",
    r"training\.(checkpoint|guide|model_card|result|run$|start|sweep|trainer|data\.loader|plan\.|step\.)",
    r"evaluation\.(evaluate|tasks)",
)
"""Modules that need JAX, as patterns; all others are host code."""
BARE = """
import importlib, importlib.abc, sys, time

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "torch", "transformers"}:
            raise ModuleNotFoundError("imports " + name)

sys.meta_path.insert(0, Blocker())
started = time.process_time()
import pshare_jax
print(time.process_time() - started)
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name, error)
"""


def host_modules() -> list[str]:
    walked = pkgutil.walk_packages([str(ROOT)], "pshare_jax.", onerror=lambda name: None)
    device = re.compile(r"pshare_jax\.(" + "|".join(DEVICE) + ")")
    return [module.name for module in walked if not device.match(module.name)]


def test_host_modules_import_without_jax_and_the_package_at_once():
    modules = host_modules()
    assert len(modules) > 50
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    command = [sys.executable, "-W", "error", "-c", BARE, *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, *failed = done.stdout.splitlines()
    assert failed == []
    assert float(seconds) < 0.3


def test_rooms_are_small():
    assert len(list(ROOT.glob("*.py"))) <= 6
    for folder in {path.parent for path in ROOT.rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 20, folder


def test_only_the_boundary_rule_subtracts_one():
    subtracts = re.compile(r"len\([\w.]*prompt[\w.]*\) ?- ?1\b|\bnum_tokens ?- ?1\b|\w_len\)? ?- ?1\b")
    found = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if subtracts.search(path.read_text())}
    assert found == {"share/boundary.py"}


def test_public_names():
    assert sorted([*pshare_jax._HOME_OF, "PshareError"]) == sorted(pshare_jax.__all__)
    assert pshare_jax.Engine.build.__module__ == "pshare_jax.engine.engine"
    assert pshare_jax.EngineConfig(tasks={"chat": "base"}).sharing == "shared"
