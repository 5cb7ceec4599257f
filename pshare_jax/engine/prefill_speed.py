"""How fast a prefill worker is, by the size of its steps.

A small step costs far more per token than a large step, so one mean over all steps would measure their sizes rather than
the machine.
"""

from collections import defaultdict


class PrefillSpeed:
    """Tokens and seconds of finished steps, by size within a factor of two. Used under the engine's lock."""

    def __init__(self) -> None:
        self._tokens: defaultdict[int, int] = defaultdict(int)
        self._seconds: defaultdict[int, float] = defaultdict(float)

    def add(self, steps: list[int], seconds: float) -> None:
        """Steps with so many tokens each finished one after another, in so many seconds together."""
        for num_tokens in steps:
            size = num_tokens.bit_length()
            self._tokens[size] += num_tokens
            self._seconds[size] += seconds * num_tokens / sum(steps)

    @property
    def seconds(self) -> float:
        """Seconds in which a step ran."""
        return sum(self._seconds.values(), 0.0)

    @property
    def best(self) -> float | None:
        """Tokens per second at the fastest size; None before any step has finished."""
        rates = (self._tokens[size] / seconds for size, seconds in self._seconds.items() if seconds > 0)
        return max(rates, default=None)
