"""Hugging Face folders: config.json, one or several safetensors files, tokenizer files.

`sources.open_source` opens a folder with `SafetensorsFolder`, which reports all faults of a folder in one error before
it reads a tensor. `share.save` and `share.lora` write the files.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pshare_jax.errors import PshareError
from pshare_jax.text.tokenizer import Tokenizer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = "model-*.safetensors"

_DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True)
class _Entry:
    """The location of one tensor: its file, first byte and shape, and the format's name of its dtype."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """A Hugging Face model folder with its weights in safetensors, opened for reading (a `Checkpoint`)."""

    def __init__(self, path: str | Path, *, weights: bool = True) -> None:
        """Check the whole folder, reading headers only; PshareError lists all faults.

        Without `weights` the folder needs no weight files, and there are no tensors to read.
        """
        self.path = Path(path)
        if not self.path.is_dir():
            raise PshareError(f"there is no model folder {self.path}; give the path of a Hugging Face model folder.")
        faults: list[str] = []
        config = _read_json_object(self.path / "config.json", faults, required=True)
        generation_config = _read_json_object(self.path / "generation_config.json", faults, required=False)
        self._entries = _collect_entries(self.path, faults) if weights else {}
        if faults:
            raise PshareError(f"the model folder {self.path} cannot be used: {'; '.join(faults)}.")
        self.config: Mapping[str, Any] = config
        self.generation_config: Mapping[str, Any] = generation_config

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder has a tokenizer.json."""
        return (self.path / "tokenizer.json").is_file()

    def names(self) -> list[str]:
        """Tensor names as stored, in file order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape of a tensor."""
        return self._entry(name).shape

    def read(self, name: str) -> np.ndarray:
        """One tensor as a new array."""
        entry = self._entry(name)
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise PshareError(
                f"tensor {name} in {entry.file} has dtype {entry.dtype}, but only {', '.join(_DTYPES)} are supported; "
                "convert the checkpoint to bfloat16 or float32."
            )
        # Plain reads: the pages of a memory map would stay resident beside the copy on the device.
        count = int(np.prod(entry.shape, dtype=np.int64))
        values = np.fromfile(entry.file, dtype=dtype.newbyteorder("<"), count=count, offset=entry.offset)
        if values.size != count:
            raise PshareError(f"{entry.file} ends within tensor {name}; download or copy it again.")
        return values.astype(dtype, copy=False).reshape(entry.shape)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder's tokenizer files."""
        return Tokenizer.from_folder(self.path)

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise PshareError(f"the model folder {self.path} has no tensor {name}.")
        return entry


def _read_json_object(file: Path, faults: list[str], *, required: bool) -> dict[str, Any]:
    """The file's JSON object; {} and a new fault if it is not an object, or required and missing."""
    if not file.is_file():
        if required:
            faults.append(f"{file.name} is missing")
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        faults.append(f"{file.name} is not valid JSON ({error})")
        return {}
    if not isinstance(value, dict):
        faults.append(f"{file.name} must contain a JSON object, not a {type(value).__name__}")
        return {}
    return value


def _collect_entries(folder: Path, faults: list[str]) -> dict[str, _Entry]:
    """All tensors of the folder's weight files; faults of the files are added to `faults`."""
    shards = sorted(folder.glob(SHARD_PATTERN))
    has_single, has_index = (folder / SINGLE_FILE).is_file(), (folder / INDEX_FILE).is_file()
    if has_index:
        return _collect_sharded(folder, shards, faults)
    if shards:
        faults.append(f"it has the shard {shards[0].name} but no {INDEX_FILE}")
    elif not has_single:
        faults.append(_describe_absence(folder))
    if not has_single:
        return {}
    return _read_header(folder / SINGLE_FILE, faults)


def _describe_absence(folder: Path) -> str:
    """The fault of a folder without safetensors, and what to do."""
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if pickled:
        return (
            f"its weights are pickled ({pickled[0].name}), and a pickle can run code; convert them to safetensors, for "
            "example with transformers' save_pretrained"
        )
    return f"it has no {SINGLE_FILE} and no {INDEX_FILE}"


def _collect_sharded(folder: Path, shards: list[Path], faults: list[str]) -> dict[str, _Entry]:
    """The tensors of all shards in the index; shards and index must agree in both directions."""
    weight_map = _read_weight_map(folder / INDEX_FILE, faults)
    if weight_map is None:
        return {}
    named = sorted(set(weight_map.values()))
    present = [file.name for file in shards]
    if (folder / SINGLE_FILE).is_file():
        present.append(SINGLE_FILE)
    faults.extend(f"{INDEX_FILE} does not name the file {name}" for name in present if name not in named)
    entries: dict[str, _Entry] = {}
    for shard in named:
        if not (folder / shard).is_file():
            faults.append(f"{INDEX_FILE} names the shard {shard}, which is missing")
            continue
        before = len(faults)
        header = _read_header(folder / shard, faults)
        if len(faults) == before:
            faults.extend(_compare_with_index(shard, header, weight_map, entries))
        entries.update(header)
    return entries


def _read_weight_map(file: Path, faults: list[str]) -> dict[str, str] | None:
    """The index's tensor name -> shard name; None and a fault if the index is damaged."""
    before = len(faults)
    index = _read_json_object(file, faults, required=True)
    if len(faults) > before:
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(shard) for shard in weight_map.values()):
        faults.append(f'{file.name} has no "weight_map" from tensor names to file names')
        return None
    return weight_map


def _is_file_name(value: object) -> bool:
    """Whether a shard name denotes a file directly in the folder."""
    return isinstance(value, str) and value != "" and Path(value).name == value


def _compare_with_index(
    shard: str, header: Mapping[str, _Entry], weight_map: Mapping[str, str], seen: Mapping[str, _Entry]
) -> list[str]:
    """Disagreements of one shard with the index and with earlier shards."""
    faults = [f"tensor {name} is in {seen[name].file.name} and in {shard}" for name in header if name in seen]
    for name in header:
        if name not in weight_map:
            faults.append(f"{shard} has tensor {name}, which {INDEX_FILE} does not name")
    for name, where in weight_map.items():
        if where == shard and name not in header:
            faults.append(f"{INDEX_FILE} names tensor {name} in {shard}, which does not have it")
    return faults


def _read_header(file: Path, faults: list[str]) -> dict[str, _Entry]:
    """A safetensors file's tensors by name; {} and a fault if the file is cut short or damaged."""
    try:
        with safe_open(file, framework="numpy"):  # the library's own checks of header, offsets and file length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        faults.append(f"{file.name} is cut short or damaged ({error}), so download or copy it again")
        return {}
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: _Entry(file, start + info["data_offsets"][0], tuple(info["shape"]), info["dtype"])
        for name, info in header.items()
    }


def save_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file atomically, with the umask's mode; safetensors alone would make it private."""
    part = file.with_name(f".writing-{file.name}")
    try:
        part.touch()
        mode = part.stat().st_mode
        save_file(dict(tensors), part, metadata={"format": "pt"})
        # Some file systems do not support modes.
        with contextlib.suppress(OSError):
            part.chmod(mode)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_safetensors(
    folder: str | Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int = 2_000_000_000
) -> None:
    """Write tensors as one model.safetensors, or as shards with an index, in place of the folder's older weight files.

    Args:
        folder: created if missing.
        tensors: Hugging Face names and host arrays, consumed lazily; at most one shard is held in memory.
        max_shard_bytes: the most tensor bytes in a shard; a larger tensor gets its own shard.

    Raises:
        PshareError: a name is given twice.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weight_files = [folder / SINGLE_FILE, folder / INDEX_FILE, *folder.glob(SHARD_PATTERN)]
    parts: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    try:
        for number, shard in enumerate(_shards(tensors, max_shard_bytes)):
            part = folder / f".writing-{number}.safetensors"
            parts.append((part, list(shard)))
            save_tensors(part, shard)
            total_bytes += sum(value.nbytes for value in shard.values())
    except BaseException:
        for part, _ in parts:
            part.unlink(missing_ok=True)
        raise
    for file in weight_files:
        file.unlink(missing_ok=True)
    _publish(folder, parts, total_bytes)


def _shards(tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> Iterable[dict[str, np.ndarray]]:
    """Group consecutive tensors into shards; without tensors, one empty shard."""
    shard: dict[str, np.ndarray] = {}
    size, seen = 0, set()
    for name, value in tensors:
        if name in seen:
            raise PshareError(f"tensor {name} was given twice, so the weights were not saved.")
        seen.add(name)
        if shard and size + value.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = np.require(value, requirements="C")
        size += value.nbytes
    if shard or not seen:
        yield shard


def _publish(folder: Path, parts: list[tuple[Path, list[str]]], total_bytes: int) -> None:
    """Give the written parts their final names, which depend on their number, and write the index."""
    if len(parts) == 1:
        parts[0][0].replace(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, (part, names) in enumerate(parts, start=1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.replace(folder / shard)
        weight_map.update(dict.fromkeys(names, shard))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
