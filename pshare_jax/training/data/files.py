"""Data files, read record by record: JSON lines, JSON, CSV, Parquet and Arrow, also compressed with gzip.

`read_file` yields (number, record): its line (JSON lines), element (JSON) or row (tables), from 1. An unreadable record is
`Broken`, an unreadable file a PshareError. `sources.py` calls it.
"""

import codecs
import csv
import gzip
import importlib
import io
import itertools
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from pshare_jax.errors import PshareError

Numbered = Iterator[tuple[int, Any]]


class Broken(NamedTuple):
    """An unreadable record."""

    reason: str
    detail: str


def read_file(file: Path) -> Numbered:
    """All records of a file.

    Raises:
        PshareError: an unknown format, or a file that is unreadable as a whole.
    """
    reader = _reader(file)
    if reader is None:
        raise PshareError(
            f"The format of {file} is not supported; use .jsonl, .json, .csv, .tsv, .parquet or .arrow, the first four also "
            "with .gz."
        )
    try:
        yield from reader(file)
    except gzip.BadGzipFile as error:
        raise PshareError(f"{file} is not a gzip file: {error}.") from None
    except (EOFError, zlib.error) as error:
        raise PshareError(f"{file} is damaged or cut off: {error}.") from None
    except OSError as error:
        raise PshareError(f"Cannot read {file}: {error.strerror or error}.") from None


def _reader(file: Path) -> Callable[[Path], Numbered] | None:
    endings = [ending.lower() for ending in file.suffixes[-2:]]
    packed = endings[-1:] == [".gz"]
    kind = endings[-1 - packed] if len(endings) > packed else ""
    return (_TEXT if packed else {**_TEXT, **_TABLES}).get(kind)


# --- text ------------------------------------------------------------------------------------------------------------


def _open(file: Path) -> io.BufferedIOBase:
    """The file's bytes, as UTF-8 without a byte-order mark if it has one."""
    # The callers close it.
    data: Any = gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb")  # noqa: SIM115
    start = data.read(4)
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            data.seek(len(mark))
            return data if encoding == "utf-8" else _reencoded(data, encoding, file)
    data.seek(0)
    return data


_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte-order marks; that of UTF-16 little-endian begins that of UTF-32."""


def _reencoded(data: io.BufferedIOBase, encoding: str, file: Path) -> io.BufferedIOBase:
    with data:
        try:
            # Such files come from tools that write them at once; they are read at once.
            return io.BytesIO(data.read().decode(encoding).encode())
        except UnicodeError as error:
            raise PshareError(f"{file} begins as {encoding.upper()} but is not: {error}.") from None


def _read_jsonl(file: Path) -> Numbered:
    with _open(file) as lines:
        yield from _json_lines(lines)


def _json_lines(lines: io.BufferedIOBase) -> Numbered:
    # Lines end with \n only; str.splitlines would also split at U+2028 and other characters of a text.
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parsed(line.rstrip())


def _read_json(file: Path) -> Numbered:
    """A list, an object with the list under a usual name, or (many .json data sets) JSON lines."""
    with _open(file) as data:
        first = next((line for line in data if line.strip()), b"")
        is_list = first.lstrip().startswith(b"[")
        has_more = any(line.strip() for line in data)
        data.seek(0)
        text = _without_mark(data)
        if not is_list and has_more and not isinstance(_parsed(first.rstrip()), Broken):
            yield from _json_lines(text)
            return
        content = text.read()
    parsed = _parsed(content, each=True)
    if isinstance(parsed, dict):
        parsed = next((parsed[name] for name in _WRAPPERS if isinstance(parsed.get(name), list)), [parsed])
    if isinstance(parsed, list):
        yield from enumerate(parsed, start=1)
    elif is_list:
        raise PshareError(f"{file} must be a JSON list or JSON lines: {parsed.reason}, {parsed.detail}.")
    else:
        yield from _json_lines(io.BytesIO(content))


_WRAPPERS = ("data", "train", "examples", "records", "rows")
"""Names under which JSON files keep their list of records."""


def _without_mark(data: io.BufferedIOBase) -> io.BufferedIOBase:
    if data.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        data.seek(0)
    return data


def _read_csv(file: Path) -> Numbered:
    delimiter = "\t" if ".tsv" in file.name.lower() else ","
    csv.field_size_limit(sys.maxsize)
    with _open(file) as data, io.TextIOWrapper(cast(Any, data), "utf-8", newline="") as text:
        try:
            for number, row in enumerate(csv.DictReader(text, delimiter=delimiter, strict=True), start=1):
                if None in row:
                    yield number, Broken("too many columns", f"row {number} has more columns than the header")
                else:
                    yield number, {name: value for name, value in row.items() if value is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise PshareError(f"{file} is not a CSV file in UTF-8: {error}.") from None


# --- tables ----------------------------------------------------------------------------------------------------------


def _read_parquet(file: Path) -> Numbered:
    parquet, arrow = _pyarrow("pyarrow.parquet", file), _pyarrow("pyarrow", file)
    try:
        with parquet.ParquetFile(file) as table:
            yield from _rows(table.iter_batches(batch_size=256))
    except arrow.ArrowException as error:
        raise PshareError(f"pyarrow cannot read {file} as Parquet: {error}.") from None


def _read_arrow(file: Path) -> Numbered:
    """Arrow's stream format, which the library datasets writes, or its file format."""
    arrow = _pyarrow("pyarrow", file)
    try:
        with arrow.memory_map(str(file)) as source:
            try:
                batches = iter(arrow.ipc.open_stream(source))
            except arrow.ArrowInvalid:
                opened = arrow.ipc.open_file(source)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            yield from _rows(batches)
    except arrow.ArrowException as error:
        raise PshareError(f"pyarrow cannot read {file} as Arrow: {error}.") from None


def _pyarrow(module: str, file: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise PshareError(f"Reading {file} needs pyarrow; install it with: pip install pyarrow.") from None


def _rows(batches: Iterator[Any]) -> Numbered:
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    for number, row in enumerate(rows, start=1):
        yield number, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Table rows have every column and struct field; null stands for a field that the record lacks."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_TEXT = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
_TABLES = {".parquet": _read_parquet, ".arrow": _read_arrow}


# --- JSON ------------------------------------------------------------------------------------------------------------


class _RepeatedKey(ValueError):
    """A JSON object with a repeated key, whose value depends on the reader."""


def _parsed(text: bytes, each: bool = False) -> Any:
    """The JSON value or Broken; with `each`, a list in which every item with a repeated key is Broken."""
    mark = _marked if each else _unique
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=mark, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return Broken("not UTF-8", f"byte {error.start + 1} is 0x{text[error.start]:02x}")
    except _RepeatedKey as error:
        return Broken("repeated key", str(error))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if each else f"column {error.colno}"
        return Broken("broken JSON", f"{error.msg} at {where}")
    except (ValueError, RecursionError) as error:
        return Broken("broken JSON", "nested too deeply" if isinstance(error, RecursionError) else str(error))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(f"the key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
    return value


def _marked(pairs: list[tuple[str, Any]]) -> Any:
    """As `_unique`, but an object that contains a fault becomes the fault, up to the whole record."""
    inner = next((item for _, value in pairs if (item := _broken_in(value)) is not None), None)
    if inner is not None:
        return inner
    try:
        return _unique(pairs)
    except _RepeatedKey as error:
        return Broken("repeated key", str(error))


def _broken_in(value: Any) -> Broken | None:
    if isinstance(value, Broken):
        return value
    if isinstance(value, list):
        return next((item for entry in value if (item := _broken_in(entry)) is not None), None)
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
