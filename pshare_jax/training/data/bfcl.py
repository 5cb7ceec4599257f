"""BFCL (Berkeley Function Calling Leaderboard): its questions, read from the bfcl-eval wheel, and its AST checker.

The wheel is downloaded and not installed, since its dependencies take 6 GB. The checker runs in a separate process
(`bfcl_process.py`). Questions have OpenAI's `tools`; a model answers with calls in its own format (text/tool_format.py).
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.text.tool_calls import CallPiece, ToolCallParser
from pshare_jax.text.tool_format import ToolFormat
from pshare_jax.training.data import bfcl_process
from pshare_jax.training.data.overlap import Asked, asked, joined
from pshare_jax.weights.pypi import download_wheel
from pshare_jax.weights.sources import default_cache_dir

PACKAGE, VERSION = "bfcl-eval", "2026.3.23"
SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
BFCL = "bfcl:"
CATEGORIES = {
    "simple": "simple_python",
    "multiple": "multiple",
    "parallel": "parallel",
    "parallel_multiple": "parallel_multiple",
    "live_simple": "live_simple",
    "live_multiple": "live_multiple",
}
"""Our category name -> BFCL's: one function, a choice of functions, several calls; users wrote the live categories."""

# BFCL's type of a parameter -> JSON schema's; `any` is any type.
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


def fetch_wheel(cache_dir: Path | None = None) -> Path:
    """The bfcl-eval wheel (2 MB), from the cache or by pip.

    Raises:
        PshareError: the download failed, or its checksum is wrong.
    """
    folder = (cache_dir or default_cache_dir()) / "pypi" / PACKAGE / VERSION
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if wheel.is_file() and _sha256(wheel) == SHA256:
        return wheel
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            part = download_wheel(PACKAGE, VERSION, Path(scratch))
            if _sha256(part) != SHA256:
                raise PshareError(
                    f"The checksum of {part.name} from the package index is wrong; use an index with the original file."
                )
            part.replace(wheel)
    except OSError as error:
        raise PshareError(f"Cannot write the cache folder {folder}: {error.strerror or error}.") from None
    return wheel


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def read_questions(category: str, wheel: Path) -> list[dict[str, Any]]:
    """The questions of a category: id, category (BFCL's name), messages, tools (OpenAI's), functions (BFCL's), ground_truth.

    Raises:
        PshareError: an unknown category.
    """
    if category not in CATEGORIES:
        raise PshareError(f"BFCL has no category {category!r}; choose one of {', '.join(CATEGORIES)}.")
    name = CATEGORIES[category]
    truths = {line["id"]: line["ground_truth"] for line in read_lines(wheel, f"possible_answer/BFCL_v4_{name}.json")}
    return [
        {
            "id": line["id"],
            "category": name,
            "messages": line["question"][0],
            "tools": openai_tools(line["function"]),
            "functions": line["function"],
            "ground_truth": truths[line["id"]],
        }
        for line in read_lines(wheel, f"BFCL_v4_{name}.json")
    ]


def parse_source(path: str) -> tuple[str, str | None]:
    """The category of `bfcl:<category>?without=bfcl:<category>`, and the category to leave out (None: nothing).

    Raises:
        PshareError: another setting, or one without a value.
    """
    category, mark, query = path.removeprefix(BFCL).partition("?")
    key, _, value = query.partition("=")
    if mark and (key != "without" or not value.startswith(BFCL) or "&" in value):
        raise PshareError(
            f"In {path}, {query!r} is not a setting of BFCL; the only one is without={BFCL}<category>, which leaves out what "
            "that category asks."
        )
    return category, value.removeprefix(BFCL) if mark else None


def asked_in(category: str, wheel: Path) -> Asked:
    """What the questions of a category ask, as a test that training must not overlap with.

    Raises:
        PshareError: an unknown category.
    """
    return joined(map(asked, read_questions(category, wheel)))


def read_lines(wheel: Path, name: str) -> list[dict[str, Any]]:
    """The objects of a data file of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"bfcl_eval/data/{name}").decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def openai_tools(functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """BFCL's functions as OpenAI's `tools`, whose parameters are a JSON schema."""
    return [
        {"type": "function", "function": {**function, "parameters": _schema(function["parameters"])}}
        for function in functions
    ]


def _schema(value: Any) -> Any:
    """A JSON schema for BFCL's description of a value: its types have other names."""
    if isinstance(value, list):
        return [_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    schema = {}
    for key, item in value.items():
        if key == "properties" and isinstance(item, dict):
            schema[key] = {name: _schema(described) for name, described in item.items()}
        elif key in ("items", "additionalProperties"):
            schema[key] = _schema(item)
        elif key != "type" or not isinstance(item, str):
            schema[key] = item
        elif item != "any":
            schema[key] = _TYPES.get(item, item)
    return schema


def parse_calls(text: str, form: ToolFormat, names: Collection[str]) -> list[dict[str, Any]] | None:
    """An answer's calls in the checker's form, [{name: arguments}]; None if it has none, or one that is not whole.

    `names` are the known functions.
    """
    parser = ToolCallParser(form, names)
    calls: dict[int, tuple[str, list[str]]] = {}
    for piece in (*parser.push(text), *parser.finish()):
        if isinstance(piece, CallPiece):
            calls.setdefault(piece.index, (piece.name or "", []))[1].append(piece.arguments)
    try:
        parsed = [{name: json.loads("".join(arguments))} for name, arguments in calls.values()]
    except (ValueError, RecursionError):
        return None
    whole = all(isinstance(arguments, dict) for call in parsed for arguments in call.values())
    return parsed if parsed and whole else None


def answer_message(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """An assistant's message with these calls, {"name", "arguments"}."""
    listed = [{"id": f"call{index:05}", "type": "function", "function": call} for index, call in enumerate(calls)]
    return {"role": "assistant", "content": None, "tool_calls": listed}


def right_calls(ground_truth: Sequence[Mapping[str, Mapping[str, list[Any]]]]) -> list[dict[str, Any]]:
    """Calls, {"name", "arguments"}, with the first accepted value of every parameter, without optional parameters.

    BFCL lists the accepted values of each parameter, including "" if it is optional. Within maps some lists are such
    choices and others are values, so a few of these answers are wrong: verify them with the checker.
    """
    return [
        {"name": name, "arguments": _first_choices(arguments)}
        for call in ground_truth
        for name, arguments in call.items()
    ]


def _first_choices(choices: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: values for name, values in choices.items() if not (isinstance(values, list) and "" in values)}
    return {name: _first(values) for name, values in given.items()}


def _first(values: Any) -> Any:
    value = values[0] if isinstance(values, list) and values else values
    if isinstance(value, dict):
        return _first_choices(value)
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [_first_choices(item) for item in value]
    return value


class BfclVerifier:
    """1.0 if BFCL's checker accepts the calls of an answer in the format `form`, else 0.0.

    The checker's process starts with the first answer.
    """

    def __init__(self, wheel: Path, form: ToolFormat) -> None:
        self._wheel, self._form = wheel, form
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, answer: str, record: Mapping[str, Any]) -> float:
        """Scores an answer to `record`, a question of `read_questions`."""
        calls = parse_calls(answer, self._form, [function["name"] for function in record["functions"]])
        return 0.0 if calls is None else float(self.check(calls, record)["valid"])

    def check(self, calls: list[dict[str, Any]], record: Mapping[str, Any]) -> dict[str, Any]:
        """The checker's verdict on calls in its form: `valid` and, if false, `reason`.

        Raises:
            PshareError: the checker's process died.
        """
        question = {key: record[key] for key in ("category", "functions", "ground_truth")} | {"calls": calls}
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.close()
            raise PshareError(f"BFCL's checker died at question {record['id']}; see its message above.")
        return json.loads(reply)

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.communicate()

    def __enter__(self) -> "BfclVerifier":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            command = [sys.executable, "-I", "-S", bfcl_process.__file__, str(self._wheel)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
            )
        return self._process
