"""Verifiers: (answer text, the question's record) -> a score from 0 to 1, 1 for a right answer.

tasks.py chooses a task's verifier; that of programs is in programs.py, BFCL's in training/data/bfcl.py.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.evaluation.answer_number import number_in

Verifier = Callable[[str, Mapping[str, Any]], float]


def exact_match(answer: str, record: Mapping[str, Any]) -> float:
    """Whether the answer equals record["answer"], apart from surrounding white space."""
    return float(answer.strip() == record["answer"].strip())


def same_number(answer: str, record: Mapping[str, Any]) -> float:
    """Whether the answer's number (answer_number.py) is that of record["answer"]; 0 where either has none."""
    found = number_in(answer)
    return float(found is not None and found == number_in(record["answer"]))


def regex_verifier(pattern: str) -> Verifier:
    """Whether the pattern's last match in the answer is the last in record["answer"], or all of it where nothing matches.

    If the pattern has a group, the first group's text counts, else that of the whole match.

    Raises:
        PshareError: the pattern is no regular expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise PshareError(f"The pattern {pattern!r} is not a regular expression of Python: {error}.") from None
    group = 1 if compiled.groups else 0

    def found_in(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        return matches[-1][group] if matches else None

    def verify(answer: str, record: Mapping[str, Any]) -> float:
        found, expected = found_in(answer), found_in(record["answer"])
        return float(found is not None and found == (record["answer"].strip() if expected is None else expected))

    return verify


def gym_verifier(dataset: Any) -> Verifier:
    """The scorer of a reasoning-gym data set; records are its items. Some tasks give partial scores."""

    def verify(answer: str, record: Mapping[str, Any]) -> float:
        return float(dataset.score_answer(answer.strip(), record))

    return verify
