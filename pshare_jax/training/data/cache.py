"""The cache of prepared data: sets of files in folders named by the key of all that determines them.

`prepare.py` looks a key up and writes the set if it is missing, into a part that is renamed when it is whole. Folders are
locked by their users, which the system undoes when a process dies: a part that nobody holds is left over and removed, a
set that somebody reads is kept.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.bfcl import BFCL, SHA256
from pshare_jax.training.data.sources import GYM, source_files
from pshare_jax.weights.sources import default_cache_dir

KEPT = 8
"""Number of sets that are kept: the last used."""
_PART = ".part-"
_CODE = ("share/boundary.py", "text/**/*.py", "training/data/**/*.py")
_LIBRARIES = ("jinja2", "tokenizers")
_TIME_CALL = re.compile(r"strftime_now(?:\s*\(\s*(['\"])([^'\"\\]+)\1\s*\)|\s+is\s+(?:not\s+)?defined)")
"""A call with a constant pattern, or the question whether there is such a function."""


def data_folder() -> Path:
    """The folder of prepared data, beside the downloaded models."""
    return default_cache_dir() / "data"


# --- the folder ------------------------------------------------------------------------------------------------------


class PreparedSets:
    """The sets below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, key: str) -> Path | None:
        """The folder of a set, which is now the last used; None if there is none."""
        folder = self.root / key
        try:
            os.utime(folder)
        except OSError:
            return None
        return folder

    @contextlib.contextmanager
    def new(self, key: str) -> Iterator[Path]:
        """A folder to write a set into. It becomes the set at the end of the `with`, and is removed after an error.

        Raises:
            PshareError: the folder cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._remove_parts()
            part, lock = self._part()
            try:
                yield part
                self._publish(part, key)
            finally:
                shutil.rmtree(part, ignore_errors=True)
                os.close(lock)
        except OSError as error:
            raise PshareError(
                f"Cannot write the cache folder {self.root}: {error.strerror or error}; free it, or set XDG_CACHE_HOME."
            ) from None

    def remove(self, key: str) -> None:
        """Removes a set that is damaged, whoever reads it."""
        _discard(self.root / key)

    def _part(self) -> tuple[Path, int]:
        while True:
            part = Path(tempfile.mkdtemp(prefix=_PART, dir=self.root))
            # Another process may take it for a part left over, until it is locked.
            with contextlib.suppress(OSError):
                return part, hold(part)

    def _publish(self, part: Path, key: str) -> None:
        try:
            part.rename(self.root / key)
        except OSError as error:
            # Another process was faster.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sets = sorted(self._sets(), key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
        for folder in sets[KEPT:]:
            _remove(folder)

    def _sets(self) -> list[Path]:
        return [folder for folder in self.root.iterdir() if folder.is_dir() and not folder.name.startswith(_PART)]

    def _remove_parts(self) -> None:
        for part in self.root.glob(f"{_PART}*"):
            _remove(part)


def hold(folder: Path, how: int = fcntl.LOCK_SH) -> int:
    """Locks a folder, by default against its removal, until the file descriptor is closed.

    Raises:
        OSError: the folder does not exist, has been removed meanwhile, or is locked otherwise (with LOCK_NB).
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, how)
        if not os.path.samestat(os.fstat(lock), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, "removed", str(folder))
    except OSError:
        os.close(lock)
        raise
    return lock


def _remove(folder: Path) -> None:
    """Removes a folder that nobody holds."""
    with contextlib.suppress(OSError):
        lock = hold(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            _discard(folder)
        finally:
            os.close(lock)


def _discard(folder: Path) -> None:
    with contextlib.suppress(OSError):
        # Renamed first, so that a removal that is interrupted leaves no half of a set.
        gone = folder if folder.name.startswith(_PART) else folder.with_name(f"{_PART}{folder.name}")
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


# --- the key ---------------------------------------------------------------------------------------------------------


def set_key(sources: list[str], tokenizer: Tokenizer, clock: datetime, settings: dict[str, Any]) -> str:
    """The key of the data that `settings` (plain values) and `tokenizer` at the time `clock` make of the sources.

    Raises:
        PshareError: a source does not exist.
    """
    content = {
        "code": _code_digest(),
        "libraries": [importlib.metadata.version(name) for name in _LIBRARIES],
        "sources": [[path, _identity(path)] for path in sources],
        "tokenizer": [tokenizer.fingerprint, tokenizer.template_fingerprint, tokenizer.template_variables],
        "time": _told_time([*tokenizer.template_sources, *_strings(settings)], clock),
        **settings,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _identity(path: str) -> Any:
    """What tells that a source has the content it had: the files' states, or the version of the package that has it."""
    if path.startswith(BFCL):
        return SHA256
    if path.startswith(GYM):
        try:
            return importlib.metadata.version("reasoning-gym")
        except importlib.metadata.PackageNotFoundError:
            return None
    return [_file_state(name, file) for name, file in source_files(path)]


def _file_state(name: str, file: Path) -> Any:
    try:
        state = file.stat()
    except OSError as error:
        raise PshareError(f"Cannot read {file}: {error.strerror or error}.") from None
    return [name, str(file.absolute()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _told_time(templates: Iterable[str], clock: datetime) -> list[str]:
    """What the templates can tell of the time: nothing, the results of constant patterns, or all of it."""
    told = []
    for template in templates:
        if "strftime_now" in _TIME_CALL.sub("", template):
            return [clock.isoformat()]
        told += [clock.strftime(pattern) for _, pattern in _TIME_CALL.findall(template) if pattern]
    return told


def _strings(value: Any) -> Iterator[str]:
    """All texts in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


@cache
def _code_digest() -> str:
    """A digest of the code that makes samples, so that no set outlives a change of it."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for pattern in _CODE:
        for file in sorted(root.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()
