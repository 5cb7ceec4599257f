"""Stand-ins for packages that a bare machine lacks, so that the library can be imported there.

The parts render no chat template, compile no grammar, read no file of weights or settings and print no progress bar, but
modules that they import do so for others. `device_check.py` calls `stand_in` before it imports the library.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

NAMES = ("gguf", "huggingface_hub", "jinja2", "llguidance", "rich", "safetensors", "tokenizers", "yaml")


class _Kind(type):
    """The type of stand-ins for classes: their attributes are stand-ins too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing


class Missing(metaclass=_Kind):
    """Stands for anything in a missing package: a base class, a type, or a function that is called with constants. Nothing can
    be done with the result of such a call.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the missing packages."""

    def __init__(self, names: Sequence[str]):
        self._names = frozenset(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in(names: Sequence[str] = NAMES) -> list[str]:
    """Provides stand-ins for those of the packages that are not installed, and returns their names."""
    missing = [name for name in names if not _installed(name)]
    if missing:
        sys.meta_path.insert(0, _Finder(missing))
    return missing


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
