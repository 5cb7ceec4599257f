"""From sampled ids to the text a client may see: detokenise, hold back what could become a stop string, cut there.

Each sequence owns one `TextOutput`. Only text that may still turn into a stop string is held, so a stop that never
comes costs nothing but real partial matches. Host-side, imports no jax.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Pieces(Protocol):
    """Token ids in, text out, never half a character (pshare_jax.text.tokenizer's detokenizer)."""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        ...

    def flush(self) -> str:
        """The text of whatever is still incomplete."""
        ...


class StopMatcher:
    """Cuts a stream of text at the stop string that is complete first (the longest, where two end together)."""

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is safe to show now; after a match (`stopped`) the text before it, then nothing."""
        if self.stopped:
            return ""
        self._held += text
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return self._release(min(matches)[1])
        return self._release(len(self._held) - self._num_held())

    def flush(self) -> str:
        """The text still held, when nothing follows."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max((len(stop) - 1 for stop in self._stops), default=0), len(self._held))
        for length in range(longest, 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0


class TextOutput:
    """One sequence's text: `push` ids, then `finish` once; the pieces together are the whole visible text."""

    def __init__(self, detokenizer: Pieces, stops: Sequence[str]):
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._matcher.stopped

    def push(self, token_id: int) -> str:
        """The text to show after this token (possibly empty)."""
        return self._matcher.push(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest of the text: an incomplete character as the tokenizer decodes it, and what was held back."""
        return self._matcher.push(self._detokenizer.flush()) + self._matcher.flush()
