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


class _Partial:
    """How much of one stop string the text so far ends with (Knuth, Morris, Pratt: constant time per character).

    The table of borders grows with the longest match, so an arbitrarily long stop string costs nothing in advance.
    """

    def __init__(self, stop: str):
        self.stop = stop
        self.length = 0
        self._borders = [0]
        """For each matched prefix: the length of the longest shorter prefix that it also ends with."""

    def push(self, text: str, may_stop: bool) -> int | None:
        """The number of characters of `text` after which the stop string is complete for the first time, if it may be."""
        if not self.length and self.stop[0] not in text:
            return None
        for at, char in enumerate(text, 1):
            self.length = self._extended(self.length, char)
            self._note_border()
            if self.length == len(self.stop):
                if may_stop:
                    return at
                self.length = self._borders[self.length - 1]
        return None

    def _extended(self, length: int, char: str) -> int:
        while length and self.stop[length] != char:
            length = self._borders[length - 1]
        return length + (self.stop[length] == char)

    def _note_border(self) -> None:
        if self.length > len(self._borders):
            self._borders.append(self._extended(self._borders[-1], self.stop[self.length - 1]))


class StopMatcher:
    """Cuts a stream of text at the stop string that is complete first (the longest, where two end together)."""

    def __init__(self, stops: Iterable[str]):
        self._partials = [_Partial(stop) for stop in stops]
        self._held = ""
        self.stopped = False

    def push(self, text: str, may_stop: bool = True) -> str:
        """The text that is safe to show now; after a match (`stopped`) the text before it, then nothing.

        A stop string counts only if it is completed by a text with `may_stop`; it may begin in an earlier text.
        """
        if self.stopped:
            return ""
        matches = []
        for partial in self._partials:
            if (end := partial.push(text, may_stop)) is not None:
                matches.append((end, end - len(partial.stop)))
        before = len(self._held)
        self._held += text
        if matches:
            self.stopped = True
            return self._release(before + min(matches)[1])
        return self._release(len(self._held) - max((partial.length for partial in self._partials), default=0))

    def flush(self) -> str:
        """The text still held, when nothing follows."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown


class TextOutput:
    """One sequence's text: `push` ids, then `finish` once; the pieces together are the whole visible text."""

    def __init__(self, detokenizer: Pieces, stops: Sequence[str]):
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._may_stop = True

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._matcher.stopped

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """The text to show after this token (possibly empty); without `may_stop` it completes no stop string."""
        self._may_stop = may_stop
        return self._matcher.push(self._detokenizer.push(token_id), may_stop)

    def finish(self) -> str:
        """The rest of the text: an incomplete character as the tokenizer decodes it, and what was held back."""
        return self._matcher.push(self._detokenizer.flush(), self._may_stop) + self._matcher.flush()
