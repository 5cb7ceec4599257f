"""Verifiers: (answer text, the question's record) -> a score from 0 to 1, 1 for a right answer.

tasks.py chooses a task's verifier; BFCL's is in training/data/bfcl.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

Verifier = Callable[[str, Mapping[str, Any]], float]


def exact_match(answer: str, record: Mapping[str, Any]) -> float:
    """Whether the answer equals record["answer"], apart from surrounding white space."""
    return float(answer.strip() == record["answer"].strip())


def gym_verifier(dataset: Any) -> Verifier:
    """The scorer of a reasoning-gym data set; records are its items. Some tasks give partial scores."""

    def verify(answer: str, record: Mapping[str, Any]) -> float:
        return float(dataset.score_answer(answer.strip(), record))

    return verify
