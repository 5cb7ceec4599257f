"""The header of a GGUF file: its metadata as plain Python values, and its table of tensors.

`gguf.GGUFFile` is the only caller. The `gguf` package's own reader makes a NumPy view of every token string, which
takes seconds and 150 MB for one vocabulary; only its constants are used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from pshare_jax.errors import PshareError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMS = 4
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor: its shape [out, in] (the file's in reverse), type number and first byte in the file."""

    shape: tuple[int, ...]
    raw_type: int
    offset: int

    @property
    def type_name(self) -> str:
        """The name of the tensor's type ("Q4_K"), or its number if the package does not know it."""
        try:
            return GGMLQuantizationType(self.raw_type).name
        except ValueError:
            return f"number {self.raw_type}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the last axis, whose length must be a multiple of the type's block size."""
        block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.raw_type)]
        return self.shape[-1] // block_size * block_bytes

    @property
    def num_rows(self) -> int:
        """The number of rows along the last axis."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata (float32 values as their shortest decimals) and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Parse the header of a little-endian GGUF file, version 2 or 3; another or a damaged file raises PshareError."""
    if not path.is_file():
        raise PshareError(f"there is no file {path}; give the path of a .gguf file.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size < 24 or stream.read(4) != _MAGIC:
            raise PshareError(f"{path} is not a GGUF file: its first bytes are not {_MAGIC.decode()!r}.")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            version = _U32.unpack_from(data, 4)[0]
            if version not in _VERSIONS:
                raise PshareError(
                    f"{path} has GGUF version {version}, but only little-endian versions 2 and 3 are supported; "
                    "convert it again with a current llama.cpp."
                )
            try:
                return _parse(_Cursor(data, 8))
            except (struct.error, ValueError, OverflowError, MemoryError) as error:
                raise PshareError(f"{path} is cut short or damaged ({error}); download or copy it again.") from None


def _parse(cursor: "_Cursor") -> GGUFHeader:
    """Parse everything after magic and version."""
    num_tensors, num_entries = cursor.u64(), cursor.u64()
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string()
        if key in metadata:
            raise ValueError(f"the metadata key {key} is repeated")
        metadata[key] = cursor.value(cursor.u32())
    tensors: dict[str, GGUFTensor] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in tensors:
            raise ValueError(f"tensor {name} is repeated")
        dims = cursor.dims()
        tensors[name] = GGUFTensor(tuple(reversed(dims)), cursor.u32(), cursor.u64())
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    start = -(-cursor.position // alignment) * alignment
    return GGUFHeader(
        metadata,
        {name: GGUFTensor(item.shape, item.raw_type, start + item.offset) for name, item in tensors.items()},
    )


class _Cursor:
    """Reads the file's primitive values in order; past the end it raises struct.error or ValueError."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def u32(self) -> int:
        """The next 32-bit number."""
        self.position += 4
        return _U32.unpack_from(self.data, self.position - 4)[0]

    def u64(self) -> int:
        """The next 64-bit number."""
        self.position += 8
        return _U64.unpack_from(self.data, self.position - 8)[0]

    def read(self, length: int) -> bytes:
        """Exactly the next `length` bytes."""
        end = self.position + length
        if end > len(self.data):
            raise ValueError("it ends within its header")
        start, self.position = self.position, end
        return self.data[start:end]

    def dims(self) -> list[int]:
        """A tensor's lengths, fastest axis first."""
        count = self.u32()
        if not 1 <= count <= _MAX_DIMS:
            raise ValueError(f"a tensor has {count} dimensions")
        return self.numbers(GGUFValueType.UINT64, count).tolist()

    def string(self) -> str:
        """A length and its number of UTF-8 bytes."""
        return self.read(self.u64()).decode("utf-8")

    def strings(self, count: int) -> list[str]:
        """`count` strings; the vocabulary's hot loop, so without a call for each string."""
        data, position, unpack = self.data, self.position, _U64.unpack_from
        found = []
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0]
            found.append(data[start:position].decode("utf-8"))
        self.position = position  # past the end after a truncated string, so that the next read fails
        return found

    def value(self, raw_type: int) -> Any:
        """A metadata value of the given type, arrays as lists."""
        kind = GGUFValueType(raw_type)
        if kind == GGUFValueType.ARRAY:
            return self.array()
        if kind == GGUFValueType.STRING:
            return self.string()
        number = self.numbers(kind, 1)[0]
        # The shortest decimal of a float32, so that 1e-5 equals the value in config.json.
        return float(str(number)) if kind == GGUFValueType.FLOAT32 else number.item()

    def array(self) -> list[Any]:
        """An array: element type, length, values."""
        raw_type, length = self.u32(), self.u64()
        kind = GGUFValueType(raw_type)
        if kind in _SCALARS:
            return self.numbers(kind, length).tolist()
        if kind == GGUFValueType.STRING:
            return self.strings(length)
        return [self.value(raw_type) for _ in range(length)]

    def numbers(self, kind: GGUFValueType, count: int) -> np.ndarray:
        """`count` numbers or flags of one kind."""
        return np.frombuffer(self.read(count * _SCALARS[kind].itemsize), dtype=_SCALARS[kind])
