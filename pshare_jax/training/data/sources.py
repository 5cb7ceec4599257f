"""Data sources, read record by record: files (files.py), globs, data sets of the hub (hub.py), reasoning-gym and BFCL.

`read_source` yields each record with its number in the file or task, from 1; an unreadable record is `Broken`.
"""

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
    asked_in,
    fetch_wheel,
    parse_source,
    read_questions,
    right_calls,
)
from pshare_jax.training.data.files import Broken, read_file
from pshare_jax.training.data.hub import HUB, hub_files
from pshare_jax.training.data.overlap import asked

GYM = "reasoning_gym:"


class Record(NamedTuple):
    """A record: its source (a file, also of the hub, a reasoning-gym task, a BFCL category), its number in it, its content."""

    source: str
    line: int
    content: Any


def read_source(path: str) -> Iterator[Record]:
    """All records of a file, a glob (files sorted by name), `hf:org/name?split=train`, `reasoning_gym:<task>?key=value&...`
    or `bfcl:<category>`.

    `bfcl:<category>?without=bfcl:<other>` leaves out what the other category asks (overlap.py).

    Raises:
        PshareError: no such file, an unsupported format, or a file that is unreadable as a whole.
    """
    if path.startswith(GYM):
        yield from _read_gym(path)
        return
    if path.startswith(BFCL):
        yield from _read_bfcl(path)
        return
    for name, file in source_files(path):
        for line, content in read_file(file):
            yield Record(name, line, content)


def source_files(path: str) -> list[tuple[str, Path]]:
    """The files of a source that consists of files, in order, with their names in reports.

    Raises:
        PshareError: there is none, or the hub does not provide it.
    """
    return hub_files(path) if path.startswith(HUB) else [(str(file), file) for file in _files(path)]


def _files(path: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        raise PshareError(f"{path} is a folder; give files, such as {path}/*.jsonl.")
    files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not files:
        raise PshareError(
            f"There is no data file {path}; give a file, a glob, hf:org/name?split=train, reasoning_gym:<task> or "
            "bfcl:<category>."
        )
    return files


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
    category, without = parse_source(path)
    wheel = fetch_wheel()
    left_out = None if without is None else asked_in(without, wheel)
    with BfclVerifier(wheel, FORMATS["json_list"]) as verifier:
        for number, question in enumerate(read_questions(category, wheel), start=1):
            if left_out is not None and asked(question).answers(left_out):
                yield Record(path, number, Broken(f"asked by {BFCL}{without}", question["id"]))
                continue
            calls = right_calls(question["ground_truth"])
            content = Broken("no answer that BFCL accepts", question["id"])
            if verifier.check([{call["name"]: call["arguments"]} for call in calls], question)["valid"]:
                messages = [*question["messages"], answer_message(calls)]
                content = {"messages": messages, "tools": question["tools"]}
            yield Record(path, number, content)
