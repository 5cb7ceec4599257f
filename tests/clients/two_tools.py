"""What every agent does here: it calls one tool, reads the result, calls the other, and answers.

Values have few choices, so that a model with random weights, which only a grammar guides, fills them in a few tokens.
"""

import json
from collections import Counter
from typing import Literal

from pydantic import BaseModel

City = Literal["Paris", "Rome"]
Number = Literal[1, 2, 3]

SYSTEM = "You count people."
QUESTION = "How many millions live in Rome, and how many with one more?"
ran: Counter[str] = Counter()


def get_population(city: City) -> int:
    """Millions of people who live in a city.

    Args:
        city: The city's name.
    """
    ran["get_population"] += 1
    return {"Paris": 2, "Rome": 3}[city]


def add(a: Number, b: Number) -> int:
    """The sum of two numbers.

    Args:
        a: A number.
        b: Another number.
    """
    ran["add"] += 1
    return a + b


TOOLS = [get_population, add]


class Total(BaseModel):
    """How many millions live in a city."""

    city: City
    total: Number | None = None


def report(**saw) -> None:
    """Prints what the client saw and how often each tool ran."""
    # Some clients leave a line without an end.
    print("\n" + json.dumps({"ran": ran, **saw}))
