"""Evaluation tasks by name: questions in the base's chat template and the module's style, and the verifier of their answers.

`reasoning_gym:<task>?key=value` has the items of a reasoning-gym task, `bfcl:<category>` the questions of BFCL; any other
name is a data file or glob, or a YAML file that names one and a verifier (task_config.py), with a question for every answer that
training would learn.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.evaluation.programs import CodeVerifier, isolates
from pshare_jax.evaluation.task_config import TaskConfig, read_task
from pshare_jax.evaluation.verifiers import Verifier, exact_match, gym_verifier, regex_verifier, same_number
from pshare_jax.share.model import Model
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.bfcl import BFCL, BfclVerifier, fetch_wheel, read_questions
from pshare_jax.training.data.config import paths_of
from pshare_jax.training.data.prepare import SampleSet, prepare
from pshare_jax.training.data.report import Report
from pshare_jax.training.data.sources import GYM, open_reasoning_gym, read_source


@dataclass(frozen=True)
class Item:
    """A question: its source, the prompt's ids, a right answer (for people), and the verifier's record."""

    name: str
    prompt_ids: tuple[int, ...]
    expected: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Questions and their verifier; for a data file also the report on its records, and `notes` for the user."""

    items: list[Item]
    verifier: Verifier
    report: Report | None = None
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def open_task(name: str, base: Model, style: ChatStyle | None = None, *, run_code: bool = False) -> Iterator[Task]:
    """The task of that name, in the base's chat template and the `style` of the module that is asked.

    A file's records that the base cannot encode are left out, and those whose own answer the verifier finds wrong. A verifier
    that runs programs needs `run_code`.

    Raises:
        PshareError: an unknown task or category, a source that cannot be read, a missing dependency of the task, a
            style without a known format of calls for a task that needs calls, or programs that may not run.
    """
    tokenizer, style = base.tokenizer, style or ChatStyle()
    if name.startswith(GYM):
        dataset = open_reasoning_gym(name)
        items = [gym_item(name, index, dataset[index], tokenizer, style) for index in range(len(dataset))]
        yield Task(items, gym_verifier(dataset))
    elif name.startswith(BFCL):
        form = tokenizer.tool_format(style)
        if form is None:
            raise PshareError(
                f"{name} needs a module with a known format of function calls; train it with tool_format."
            )
        wheel = fetch_wheel()
        items = [bfcl_item(question, tokenizer, style) for question in read_questions(name.removeprefix(BFCL), wheel)]
        with BfclVerifier(wheel, form) as verifier:
            yield Task(items, verifier)
    else:
        yield _file_task(read_task(name), base, style, run_code)


def _file_task(config: TaskConfig, base: Model, style: ChatStyle, run_code: bool) -> Task:
    if config.verifier == "code" and not run_code:
        raise PshareError(
            f"The task of {config.path} runs programs that the model writes, with your rights; to allow that, give --run-code."
        )
    data = prepare(
        config.data(base.config.max_len), base.tokenizer, base.stop_ids, vocab_size=base.config.vocab_size, style=style
    )
    verifier, fields = _verifier(config), _fields(config) if config.verifier == "code" else {}
    items = sample_items(data.train, base.tokenizer, fields)
    right = [item for item in items if verifier(item.expected, item.record) >= 1]
    if not right:
        raise PshareError(
            f"The verifier {config.verifier} finds none of the {len(items)} answers in {config.path} right; choose another."
        )
    notes = [f"{len(items) - len(right)} of {len(items)} questions are left out, whose own answer is not right"]
    if config.verifier == "code" and not isolates():
        notes.append("the system allows no namespaces: programs that the model writes can use the network")
    return Task(right, verifier, data.report, tuple(notes[len(right) == len(items) :]))


def _verifier(config: TaskConfig) -> Verifier:
    if config.pattern is not None:
        return regex_verifier(config.pattern)
    if config.verifier == "code":
        return CodeVerifier(config.cpu_seconds)
    return same_number if config.verifier == "number" else exact_match


def _fields(config: TaskConfig) -> dict[tuple[str, int], dict[str, Any]]:
    """(source, line) -> the record's own fields, under the names that `columns` gives."""
    fields = {}
    for path in paths_of(config.source):
        for source, line, content in read_source(path):
            if isinstance(content, dict):
                renamed = {ours: content[theirs] for ours, theirs in config.columns.items() if theirs in content}
                fields[source, line] = {**content, **renamed}
    return fields


def sample_items(
    samples: SampleSet, tokenizer: Tokenizer, fields: Mapping[tuple[str, int], Mapping[str, Any]] | None = None
) -> list[Item]:
    """A question for every answer of the samples, with the true conversation before it.

    The verifier's record has the answer, and the `fields` of the source's line.
    """
    items = []
    for index in (int(index) for group in samples.members for index in group):
        sample = samples.store[index]
        for start, end in sample.turns:
            answer = tokenizer.decode(sample.ids[start:end])
            record = {**(fields or {}).get((sample.source, sample.line), {}), "answer": answer}
            items.append(Item(f"{sample.source}:{sample.line}", sample.ids[:start], answer, record))
    return items


def gym_item(name: str, index: int, entry: Mapping[str, Any], tokenizer: Tokenizer, style: ChatStyle) -> Item:
    """An item of a reasoning-gym task, in the form that training on that source uses."""
    ids = tokenizer.encode_question(entry["question"], style)
    return Item(f"{name}:{index + 1}", tuple(ids), str(entry["answer"]), entry)


def bfcl_item(question: Mapping[str, Any], tokenizer: Tokenizer, style: ChatStyle) -> Item:
    """An item from a question of `read_questions`."""
    ids = tokenizer.encode_chat(question["messages"], tools=question["tools"], style=style)
    return Item(question["id"], tuple(ids), json.dumps(question["ground_truth"]), question)
