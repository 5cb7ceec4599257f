"""Verifiers: (answer text, what is known of the question) -> a score from 0 to 1, 1 for a right answer.

`eval_tasks.py` chooses one for a task; BFCL's is in `bfcl.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

Verifier = Callable[[str, Mapping[str, Any]], float]


def exact_match(answer: str, record: Mapping[str, Any]) -> float:
    """Whether the answer is record["answer"], but for white space around either."""
    return float(answer.strip() == record["answer"].strip())


def gym_verifier(dataset: Any) -> Verifier:
    """The scorer of a reasoning-gym data set; records are its items. Some tasks give a part of 1 to a part of an answer."""

    def verify(answer: str, record: Mapping[str, Any]) -> float:
        return float(dataset.score_answer(answer.strip(), record))

    return verify
