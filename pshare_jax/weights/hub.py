"""The Hugging Face hub through its own library, whose cache, token and offline mode count; its errors as one sentence.

sources.py fetches models with it, training/data/hub.py data sets.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from pshare_jax.errors import PshareError

Kind = Literal["model", "dataset"]
_NAMED = {"model": "model", "dataset": "data set"}


@contextmanager
def hub_errors(start: str, kind: Kind = "model") -> Iterator[None]:
    """Turns the library's errors into a PshareError: `start`, then the reason and what to do."""
    from huggingface_hub import errors

    what = _NAMED[kind]
    try:
        yield
        return
    except errors.GatedRepoError:
        reason = (
            "access is restricted; accept the terms on its page, then log in with `hf auth login`, or set HF_TOKEN to a "
            "token of yours"
        )
    except errors.RepositoryNotFoundError:
        reason = f"the hub has no public {what} of that name, and none that your token, if any, gives access to"
    except errors.RevisionNotFoundError:
        reason = f"the {what} has no such revision"
    except errors.HfHubHTTPError as error:
        reason = f"the hub returned an error ({str(error).splitlines()[0]})"
    except OSError:  # also the hub's errors for offline mode and for what is not cached
        reason = f"the hub cannot be reached and the {what} is not in its cache"
    except errors.HFValidationError:
        reason = "the name is not a valid hub name"
    raise PshareError(f"{start}: {reason}.")


class Listing(NamedTuple):
    """Paths of a data set's files; if the hub did not tell, of those that are `cached`."""

    files: list[str]
    cached: bool


def list_dataset(name: str, revision: str) -> Listing:
    """The files of a data set at a revision.

    Raises:
        OSError, HFValidationError: the library's, for `hub_errors`; nothing is cached either.
    """
    import huggingface_hub

    try:
        # Unlike list_repo_files, this fails at once without a network.
        found = huggingface_hub.HfApi().dataset_info(name, revision=revision)
        return Listing([file.rfilename for file in found.siblings or []], False)
    except Exception as error:
        cached = _cached(name, revision)
        if cached is None and isinstance(error, OSError | ValueError):
            raise
        if cached is None:
            # The HTTP client's own errors, such as a refused connection.
            raise ConnectionError(str(error)) from error
        return Listing([path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()], True)


def _cached(name: str, revision: str) -> Path | None:
    import huggingface_hub

    try:
        # No file is asked for, so an incomplete folder is not refused.
        folder = huggingface_hub.snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=[], local_files_only=True
        )
    except OSError:
        return None
    return Path(folder)


def fetch_dataset(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """The folder of a data set in the cache, with all its files that match; downloaded as far as they are missing."""
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    )
