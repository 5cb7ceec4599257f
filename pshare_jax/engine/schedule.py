"""Who runs next: the policy of decode turns and of prefill chunks, pure host code; admission.py decides who may hold pages.

Bounds, in device calls of one worker, whatever else runs (tests/engine/test_fairness_bounds.py states them as properties):

- Decode: a turn is one call. Between two tokens of a sequence every weights group has at most ceil(its rows / rows of a
  call) turns, and scoring has one. Admission keeps a group's rows at no more than a call has, so that is one turn each.
- Prefill: a prompt that fits in one chunk waits for at most one chunk of a longer prompt, the short prompts before it, and
  one more chunk of longer prompts for each chunk of tokens that these have. Longer prompts get at least half of the tokens,
  the oldest first.
"""

from collections.abc import Callable, Container
from collections.abc import Sequence as Items

from pshare_jax.engine import scoring
from pshare_jax.engine.sequence import Sequence
from pshare_jax.engine.shapes import Shape


class DecodeTurns:
    """The turns of one decode worker: the turn belongs to the weights group of the least recently served sequence.

    A sequence joins at the current turn, so that new sequences do not go before running answers. Scoring is one group more:
    all sequences that have tokens to score share its turns, the least recently served first.
    """

    def __init__(self) -> None:
        self._now = 0
        self._scored = 0

    def join(self, sequence: Sequence) -> None:
        """A sequence starts, or continues, to decode."""
        sequence.decode.last_turn = self._now

    def order(self, running: Items[Sequence], shapes: Container[Shape]) -> list[list[Sequence]]:
        """The candidates for the next turn, best first: sequences to score, or the rows of a group.

        Rows are in the order of their last turn. A suspect (failures.py) has a call for itself: it is alone, or left out.
        `shapes` are the shapes that may be used.
        """
        candidates: list[tuple[int, int, list[Sequence]]] = []
        scored = sorted((sequence for sequence in running if not sequence.decode.opened), key=_least_recently)
        if scored:
            scored = scoring.batch_of(_suspects_alone(scored, "scoring"), shapes)
            candidates.append((self._scored, 1, scored))
        groups: dict[int, list[Sequence]] = {}
        for sequence in sorted((sequence for sequence in running if sequence.decode.opened), key=_least_recently):
            if not sequence.decode.has_row:
                continue
            groups.setdefault(sequence.group, []).append(sequence)
        candidates += [
            (rows[0].decode.last_turn, 0, _suspects_alone(rows, "decode", "preemption")) for rows in groups.values()
        ]
        return [rows for *_, rows in sorted(candidates, key=lambda candidate: candidate[:2])]

    def served(self, rows: Items[Sequence]) -> None:
        """These sequences have had the turn."""
        self._now += 1
        if not rows[0].decode.opened:
            self._scored = self._now
        for sequence in rows:
            sequence.decode.last_turn = self._now


class PrefillTurns:
    """The chunks of one prefill worker: after a chunk of a long prompt, short prompts may run for as many tokens."""

    def __init__(self, chunk_tokens: int):
        self._chunk_tokens = chunk_tokens
        self._credit = chunk_tokens

    def is_short(self, num_tokens: int) -> bool:
        """Whether so many tokens to encode fit in one chunk."""
        return num_tokens <= self._chunk_tokens

    def order(self, ready: Items[Sequence], age: Callable[[Sequence], int]) -> list[Sequence]:
        """The sequences in the order in which they are to have a chunk; `age` is less for older sequences."""
        ready = sorted(ready, key=age)
        short = [sequence for sequence in ready if self.is_short(sequence.prefill.num_left)]
        long = [sequence for sequence in ready if not self.is_short(sequence.prefill.num_left)]
        order = [*short, *long] if self._credit > 0 or not long else [*long, *short]
        return _suspects_alone(order, "prefill")

    def ran(self, first_left: int, num_slots: int) -> None:
        """A call of so many token slots, whose first sequence had `first_left` tokens to encode before it."""
        self._credit = self._credit - num_slots if self.is_short(first_left) else self._chunk_tokens


def _least_recently(sequence: Sequence) -> tuple[int, int]:
    return sequence.decode.last_turn, sequence.number


def _suspects_alone(rows: list[Sequence], *kinds: str) -> list[Sequence]:
    """Suspects of these kinds of steps have a call for themselves: the first row alone, or the rows without them."""
    suspects = [sequence for sequence in rows if sequence.suspect is not None and sequence.suspect[0] in kinds]
    if rows and rows[0] in suspects:
        return rows[:1]
    return [sequence for sequence in rows if sequence not in suspects]
