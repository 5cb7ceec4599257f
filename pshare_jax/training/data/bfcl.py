"""BFCL (Berkeley Function Calling Leaderboard): its questions, read out of the bfcl-eval wheel, and its AST checker.

The wheel is downloaded once and never installed: its dependencies are 6 GB of other packages. The checker runs in a
process of its own (`bfcl_process.py`). A model answers with a JSON list of calls, [{"name": ..., "arguments": {...}}].
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.training.data import bfcl_process
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
"""Our names of the categories, and BFCL's: one function to call, the right one out of several, several calls; live ones were
written by users."""

_SYSTEM = """\
You call functions. You have these:
{functions}
Answer with the calls that the request needs as a JSON list and nothing else, like this:
[{{"name": "function", "arguments": {{"parameter": "value"}}}}]"""


def fetch_wheel(cache_dir: Path | None = None) -> Path:
    """The bfcl-eval wheel (2 MB), from the cache or by pip.

    Raises:
        PshareError: it cannot be downloaded, or is not the file that this version is known to be.
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
                    f"The wheel {part.name} from your package index is not the known one; BFCL is not run with it."
                )
            part.replace(wheel)
    except OSError as error:
        raise PshareError(f"The cache folder {folder} cannot be written ({error}).") from None
    return wheel


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def read_questions(category: str, wheel: Path) -> list[dict[str, Any]]:
    """The questions of a category: id, category (BFCL's name), messages, functions, ground_truth.

    Raises:
        PshareError: another category.
    """
    if category not in CATEGORIES:
        raise PshareError(f"BFCL's category {category!r} is not one of {', '.join(CATEGORIES)}.")
    name = CATEGORIES[category]
    truths = {line["id"]: line["ground_truth"] for line in read_lines(wheel, f"possible_answer/BFCL_v4_{name}.json")}
    return [
        {
            "id": line["id"],
            "category": name,
            "messages": tool_messages(line["function"], line["question"][0]),
            "functions": line["function"],
            "ground_truth": truths[line["id"]],
        }
        for line in read_lines(wheel, f"BFCL_v4_{name}.json")
    ]


def read_lines(wheel: Path, name: str) -> list[dict[str, Any]]:
    """The objects of one of the wheel's data files."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"bfcl_eval/data/{name}").decode()
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def tool_messages(
    functions: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A chat that asks for calls of these functions: our system message, then the messages.

    Not the template's `tools`: templates without them leave them out silently, and each wants another form of answer.
    """
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    return [{"role": "system", "content": _SYSTEM.format(functions=listed)}, *map(dict, messages)]


def parse_calls(text: str) -> list[dict[str, Any]] | None:
    """The calls of an answer in the checker's form, [{name: arguments}]; None if it is not a JSON list of calls."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        return None
    return [{call["name"]: call["arguments"]} for call in calls]


def _is_call(call: Any) -> bool:
    return (
        isinstance(call, dict)
        and call.keys() == {"name", "arguments"}
        and isinstance(call["name"], str)
        and isinstance(call["arguments"], dict)
    )


def right_answer(ground_truth: Sequence[Mapping[str, Mapping[str, list[Any]]]]) -> str:
    """An answer with the first of all values that BFCL accepts; what may be left out is left out.

    BFCL lists the accepted values of every parameter, "" among them if it need not be given. Inside of maps some lists are
    such choices and some are plain values, so a few answers are not right: ask the checker.
    """
    calls = [
        {"name": name, "arguments": _first_choices(arguments)}
        for call in ground_truth
        for name, arguments in call.items()
    ]
    return json.dumps(calls, ensure_ascii=False)


def _first_choices(choices: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: values for name, values in choices.items() if not (isinstance(values, list) and "" in values)}
    return {name: _first(values) for name, values in given.items()}


def _first(values: Any) -> Any:
    value = values[0] if isinstance(values, list) and values else values
    if isinstance(value, dict):
        return _first_choices(value)
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return [_first_choices(one) for one in value]
    return value


class BfclVerifier:
    """1.0 for an answer whose calls BFCL's checker accepts, else 0.0. Its process starts with the first answer."""

    def __init__(self, wheel: Path) -> None:
        self._wheel = wheel
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, answer: str, record: Mapping[str, Any]) -> float:
        """`record` is a question of `read_questions`."""
        calls = parse_calls(answer)
        return 0.0 if calls is None else float(self.check(calls, record)["valid"])

    def check(self, calls: list[dict[str, Any]], record: Mapping[str, Any]) -> dict[str, Any]:
        """The checker's verdict on calls in its form: `valid`, and the `reason` if not.

        Raises:
            PshareError: the checker's process ended.
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
            raise PshareError(f"BFCL's checker ended while it looked at {record['id']}; its own message is above.")
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
