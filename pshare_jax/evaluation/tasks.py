"""Evaluation tasks by name: questions in the base's chat template and the module's style, and the verifier of their answers.

`reasoning_gym:<task>?key=value` has the items of a reasoning-gym task, `bfcl:<category>` the questions of BFCL; any other
name is a data file or glob, with a question for every answer that training would learn, compared as a whole.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.evaluation.verifiers import Verifier, exact_match, gym_verifier
from pshare_jax.share.model import Model
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.tokenizer import Tokenizer
from pshare_jax.training.data.bfcl import BFCL, BfclVerifier, fetch_wheel, read_questions
from pshare_jax.training.data.config import DataConfig, SourceConfig
from pshare_jax.training.data.prepare import SampleSet, prepare
from pshare_jax.training.data.report import Report
from pshare_jax.training.data.sources import GYM, open_reasoning_gym
from pshare_jax.training.data.unread import EVERY


@dataclass(frozen=True)
class Item:
    """A question: its source, the prompt's ids, a right answer (for people), and the verifier's record."""

    name: str
    prompt_ids: tuple[int, ...]
    expected: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Questions and their verifier; for a data file also the report on its records."""

    items: list[Item]
    verifier: Verifier
    report: Report | None = None


@contextlib.contextmanager
def open_task(name: str, base: Model, style: ChatStyle | None = None) -> Iterator[Task]:
    """The task of that name, in the base's chat template and the `style` of the module that is asked.

    A file's records that the base cannot encode are left out.

    Raises:
        PshareError: an unknown task or category, a source that cannot be read, a missing dependency of the task, or a
            style without a known format of calls for a task that needs calls.
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
        config = DataConfig([SourceConfig(name, ignore=[EVERY])], max_len=base.config.max_len)
        data = prepare(config, tokenizer, base.stop_ids, vocab_size=base.config.vocab_size, style=style)
        yield Task(sample_items(data.train, tokenizer), exact_match, data.report)


def sample_items(samples: SampleSet, tokenizer: Tokenizer) -> list[Item]:
    """A question for every answer of the samples, with the true conversation before it; for `exact_match`."""
    items = []
    for index in (int(index) for group in samples.members for index in group):
        sample = samples.store[index]
        for start, end in sample.turns:
            answer = tokenizer.decode(sample.ids[start:end])
            items.append(Item(f"{sample.source}:{sample.line}", sample.ids[:start], answer, {"answer": answer}))
    return items


def gym_item(name: str, index: int, entry: Mapping[str, Any], tokenizer: Tokenizer, style: ChatStyle) -> Item:
    """An item of a reasoning-gym task, in the form that training on that source uses."""
    ids = tokenizer.encode_question(entry["question"], style)
    return Item(f"{name}:{index + 1}", tuple(ids), str(entry["answer"]), entry)


def bfcl_item(question: Mapping[str, Any], tokenizer: Tokenizer, style: ChatStyle) -> Item:
    """An item from a question of `read_questions`."""
    ids = tokenizer.encode_chat(question["messages"], tools=question["tools"], style=style)
    return Item(question["id"], tuple(ids), json.dumps(question["ground_truth"]), question)
