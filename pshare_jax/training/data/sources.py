"""Data sources, read record by record: .jsonl, .json and .parquet files, globs, reasoning-gym and BFCL.

`read_source` yields each record with its line (JSONL), element (JSON), row (Parquet) or item number, all from 1; an
unreadable record is `Broken`, an unreadable file a PshareError.
"""

import codecs
import glob
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from pshare_jax.errors import PshareError
from pshare_jax.text.tool_format import FORMATS
from pshare_jax.training.data.bfcl import (
    BFCL,
    BfclVerifier,
    answer_message,
    fetch_wheel,
    read_questions,
    right_calls,
)

GYM = "reasoning_gym:"


class Broken(NamedTuple):
    """An unreadable record."""

    reason: str
    detail: str


class Record(NamedTuple):
    """A record: its source (a file, a reasoning-gym task, a BFCL category), its number in it, its content."""

    source: str
    line: int
    content: Any


def read_source(path: str) -> Iterator[Record]:
    """All records of a file, a glob (files sorted by name), `reasoning_gym:<task>?key=value&...` or `bfcl:<category>`.

    Raises:
        PshareError: no such file, an unsupported format, or a file that is unreadable as a whole.
    """
    if path.startswith(GYM):
        yield from _read_gym(path)
        return
    if path.startswith(BFCL):
        yield from _read_bfcl(path)
        return
    for file in _files(path):
        reader = _READERS.get(file.suffix)
        if reader is None:
            raise PshareError(f"The format of {file} is not supported; use a .jsonl, .json or .parquet file.")
        try:
            for line, content in reader(file):
                yield Record(str(file), line, content)
        except OSError as error:
            raise PshareError(f"Cannot read {file}: {error.strerror or error}.") from None


def _files(path: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        raise PshareError(f"{path} is a folder; give files, such as {path}/*.jsonl.")
    files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not files:
        raise PshareError(
            f"There is no data file {path}; give a file, a glob, reasoning_gym:<task> or bfcl:<category>."
        )
    return files


# --- files -----------------------------------------------------------------------------------------------------------


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as lines:
        # Lines end with \n only; str.splitlines would also split at U+2028 and other characters of a text.
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield number, _parsed(text.rstrip())


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open("rb") as data:
        start = data.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not start.startswith(b"["):
        # Many .json data sets contain JSON lines.
        yield from _read_jsonl(file)
        return
    parsed = _parsed(file.read_bytes().removeprefix(codecs.BOM_UTF8), each=True)
    if isinstance(parsed, Broken):
        raise PshareError(f"{file} must be a JSON list or JSON lines: {parsed.reason}, {parsed.detail}.")
    yield from enumerate(parsed, start=1)


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        invalid = importlib.import_module("pyarrow").ArrowException
    except ImportError:
        raise PshareError(f"Reading {file} needs pyarrow; install it with: pip install pyarrow.") from None
    try:
        number = 0
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield number, _without_nulls(row)
    except invalid as error:
        raise PshareError(f"pyarrow cannot read {file} as Parquet: {error}.") from None


def _without_nulls(value: Any) -> Any:
    """Table rows have every column and struct field; null stands for a field that the record lacks."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}


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


# --- reasoning-gym ---------------------------------------------------------------------------------------------------


def open_reasoning_gym(path: str) -> Any:
    """The data set of `reasoning_gym:<task>?seed=1&size=1000&key=value`: items with question and answer, and
    `score_answer(answer, item)` (1.0 if right). All keys are passed to the task's config; `a.b=c` sets a key of a map.

    Raises:
        PshareError: reasoning-gym is not installed, has no such task, or rejects the settings.
    """
    task, _, query = path.removeprefix(GYM).partition("?")
    try:
        gym = importlib.import_module("reasoning_gym")
    except ImportError:
        raise PshareError(
            f"The source {path} needs reasoning-gym; install it with: pip install reasoning-gym."
        ) from None
    settings = {"seed": 1, "size": 1000, **_gym_settings(path, query)}
    known = importlib.import_module("reasoning_gym.factory").DATASETS
    if task not in known:
        raise PshareError(
            f"reasoning-gym has no task {task!r}; choose one of its {len(known)} tasks, such as {min(known)}."
        )
    if type(settings["size"]) is not int or settings["size"] < 1 or type(settings["seed"]) is not int:
        raise PshareError(f"In {path}, seed and size must be integers, size at least 1.")
    try:
        return gym.create_dataset(task, **settings)
    except (TypeError, ValueError, AssertionError, AttributeError) as error:
        raise PshareError(f"The reasoning-gym task {task} rejects the settings in {path}: {error}.") from None


def _read_gym(path: str) -> Iterator[Record]:
    data = open_reasoning_gym(path)
    for index in range(len(data)):
        item = data[index]
        yield Record(path, index + 1, {"prompt": item["question"], "completion": str(item["answer"])})


def _gym_settings(path: str, query: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in query.split("&") if query else []:
        key, equals, text = part.partition("=")
        *outer, name = unquote(key).split(".")
        inside = settings
        for step in outer:
            inside = inside.setdefault(step, {})
            if not isinstance(inside, dict):
                raise PshareError(f"In {path}, {step} is both a value and a map; use only one.")
        if not equals or not name or name in inside:
            raise PshareError(f"In {path}, {part!r} must have the form key=value, with each key once.")
        inside[name] = _gym_value(unquote(text))
    return settings


def _gym_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


# --- BFCL ------------------------------------------------------------------------------------------------------------


def _read_bfcl(path: str) -> Iterator[Record]:
    """The category's questions as `pshare-evaluate` asks them, each with calls that the checker accepts."""
    wheel = fetch_wheel()
    with BfclVerifier(wheel, FORMATS["json_list"]) as verifier:
        for number, question in enumerate(read_questions(path.removeprefix(BFCL), wheel), start=1):
            calls = right_calls(question["ground_truth"])
            content = Broken("no answer that BFCL accepts", question["id"])
            if verifier.check([{call["name"]: call["arguments"]} for call in calls], question)["valid"]:
                messages = [*question["messages"], answer_message(calls)]
                content = {"messages": messages, "tools": question["tools"]}
            yield Record(path, number, content)
