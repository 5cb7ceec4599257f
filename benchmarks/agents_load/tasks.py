"""The folders of the tasks' modules; they are written by modules.py in a process of its own, which imports JAX."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pshare_jax.errors import PshareError

ROOT = Path(__file__).parents[2]
MANIFEST = "decode_module.json"


def task_modules(base: str, kind: str, names: Sequence[str], parent: Path) -> dict[str, str]:
    """Name -> `base`, or the folder below `parent` of a module of `kind`; each is different. Those that exist are kept.

    Raises:
        PshareError: the base cannot be loaded.
    """
    if kind == "base":
        return dict.fromkeys(names, "base")
    folder = (parent / f"{re.sub(r'[^A-Za-z0-9.]+', '-', base).strip('-')}-{kind}").resolve()
    found = {name: folder / name for name in names}
    missing = [str(path) for path in found.values() if not (path / MANIFEST).is_file()]
    if missing:
        command = [sys.executable, "-m", "benchmarks.agents_load.modules", base, kind, *missing]
        try:
            subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
        except subprocess.CalledProcessError:
            raise PshareError(f"The modules of {base} could not be written; the output above says why.") from None
    return {name: str(path) for name, path in found.items()}
