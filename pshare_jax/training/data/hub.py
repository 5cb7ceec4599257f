"""Data sets of the Hugging Face hub: which Parquet files are a split of `hf:org/name[/config]?split=train[&revision=...]`.

sources.py calls `hub_files`. The files lie in the hub's own cache, from which they are also read without a network.
"""

import glob
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from pshare_jax.errors import PshareError
from pshare_jax.weights.hub import fetch_dataset, hub_errors, list_dataset

HUB = "hf:"
_CONVERTED = "refs/convert/parquet"
"""The branch with the hub's own conversion of a data set: CONFIG/SPLIT/0000.parquet."""
_FORM = "hf:org/name?split=train or hf:org/name/config?split=train, maybe with &revision=..."
_SPLIT_FILE = re.compile(r"(?:(?P<folder>.+)/)?(?P<split>[\w.]+?)(?:-\d+-of-(?P<count>\d+)(?:-\w+)?)?\.parquet")
_CONVERTED_FILE = re.compile(r"(?P<config>[^/]+)/(?P<split>[^/]+)/\d+\.parquet")


class _Source(NamedTuple):
    """A source's parts, None where it does not say them."""

    name: str
    config: str | None
    split: str | None
    revision: str | None


class _Part(NamedTuple):
    """A split of a config: its files in the repository, patterns that fit these and no others, and their number as their
    names say (None: they do not).
    """

    config: str
    split: str
    files: list[str]
    patterns: list[str]
    total: int | None


def hub_files(path: str) -> list[tuple[str, Path]]:
    """A source's files in order: the name for reports, which has the commit, and the local path.

    Raises:
        PshareError: no such data set, config, split or revision; several of them, which the source must choose from; no
            access; or no network, and not all of it is cached.
    """
    source = _parse(path)
    with hub_errors(f"The Hugging Face hub does not provide {path}", "dataset"):
        revision, parts, cached = _listed(source)
        part = _chosen(path, source, parts, cached)
        # By pattern: of a file that a cache lacks, only the library may know.
        folder = fetch_dataset(source.name, revision, part.patterns)
    if part.total is not None and part.total > len(part.files):
        raise PshareError(
            f"{path} has {part.total} files, but only {len(part.files)} of them are cached; run it once with a network."
        )
    # The cache's folder is named by the commit.
    return [(f"{HUB}{source.name}@{folder.name[:8]}/{file}", folder / file) for file in part.files]


def _parse(path: str) -> _Source:
    text, _, query = path.removeprefix(HUB).partition("?")
    settings: dict[str, str] = {}
    for part in query.split("&") if query else []:
        key, _, value = part.partition("=")
        if key not in ("split", "revision") or key in settings or not value:
            raise PshareError(f"The source {path} must have the form {_FORM}.")
        settings[key] = unquote(value)
    names = text.split("/")
    if len(names) not in (2, 3) or not all(names):
        raise PshareError(f"The source {path} must have the form {_FORM}.")
    config = names[2] if len(names) == 3 else None
    return _Source("/".join(names[:2]), config, settings.get("split"), settings.get("revision"))


def _listed(source: _Source) -> tuple[str, list[_Part], bool]:
    """The revision with Parquet files, the data set's own before the converted one, its splits, and whether only cached files
    are known.
    """
    from huggingface_hub import errors

    if source.revision is not None:
        files, cached = list_dataset(source.name, source.revision)
        return source.revision, _parts(files, source.revision), cached
    failure: OSError | None = None
    for revision in ("main", _CONVERTED):
        try:
            files, cached = list_dataset(source.name, revision)
            if parts := _parts(files, revision):
                return revision, parts, cached
        except (errors.GatedRepoError, errors.RepositoryNotFoundError):
            raise
        except OSError as error:
            # Not every data set is converted; without a network, one of the two is cached.
            failure = failure or error
    if failure is not None and not isinstance(failure, errors.RevisionNotFoundError):
        raise failure
    return _CONVERTED, [], False


def _parts(files: Iterable[str], revision: str) -> list[_Part]:
    """The splits that the files' names tell, sorted."""
    form = _CONVERTED_FILE if revision == _CONVERTED else _SPLIT_FILE
    found: dict[tuple[str, str], list[re.Match[str]]] = {}
    for file in sorted(files):
        if match := form.fullmatch(file):
            found.setdefault((_config(match), match["split"]), []).append(match)
    return [_part(config, split, matches) for (config, split), matches in sorted(found.items())]


def _config(match: re.Match[str]) -> str:
    fields = match.groupdict()
    folder = fields.get("config") or fields.get("folder") or "data"
    folder = folder.removeprefix("data/")
    return "default" if folder == "data" else folder


def _part(config: str, split: str, matches: list[re.Match[str]]) -> _Part:
    counts = Counter(match.groupdict().get("count") for match in matches)
    (count,) = counts if len(counts) == 1 else (None,)
    patterns = sorted({pattern for match in matches for pattern in _patterns(match)})
    return _Part(config, split, [match[0] for match in matches], patterns, None if count is None else int(count))


def _patterns(match: re.Match[str]) -> list[str]:
    split_at = match.start("split")
    before, split = glob.escape(match[0][:split_at]), glob.escape(match["split"])
    if "config" in match.groupdict():
        return [f"{before}{split}/*.parquet"]
    return [f"{before}{split}.parquet", f"{before}{split}-*.parquet"]


def _chosen(path: str, source: _Source, parts: list[_Part], cached: bool) -> _Part:
    """The part that the source names, or the only one."""
    if not parts:
        raise PshareError(
            f"{path} has no Parquet files that are named by split, and the hub has not converted it; download its files and "
            "give their paths."
        )
    config, split = source.config, source.split
    fits = [part for part in parts if config in (None, part.config) and split in (None, part.split)]
    if len(fits) > 1 and config is None and split is not None:
        fits = [part for part in fits if part.config == "default"] or fits
    if len(fits) == 1:
        return fits[0]
    listed = [f"{HUB}{source.name}/{part.config}?split={part.split}" for part in fits or parts]
    named = f"{', '.join(listed[:8])}{', ...' if len(listed) > 8 else ''}"
    if fits:
        raise PshareError(f"{path} may be several of the data set's splits; give one of {named}.")
    if cached:
        raise PshareError(f"{path} is not cached and the hub cannot be reached; cached is {named}.")
    raise PshareError(f"{path} is none of the data set's splits; give one of {named}.")
