"""Reads JSON out of text that arrives in pieces, and gives each value as it was written. Host code.

Used by the parser of function calls. Every character is looked at a bounded number of times, however the text is split.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A part of a parse: it pauses where the text ends, and goes on when more has arrived."""

BLANK = " \t\r\n"
BLANKS = re.compile(r"[ \t\r\n]*")
_SCALAR = re.compile(r'[^ \t\r\n,:"{}\[\]]*')
_STRUCTURELESS = re.compile(r'[^"{}\[\]]*')
_UNESCAPED = re.compile(r'[^"\\]*')
_CLOSING = {"{": "}", "[": "]"}


class NotJson(Exception):
    """The text at this place is not what the reader expects, or it has ended."""


class JsonSource:
    """Text that has arrived and was not read yet. All that is read goes to `on_read` too.

    Values are found by their quotes and brackets; what is between these is not checked.
    """

    def __init__(self, on_read: Callable[[str], None]):
        self._on_read = on_read
        self._text, self._at = "", 0
        self.ended = False

    def feed(self, text: str) -> None:
        """Adds text."""
        self._text, self._at = self._text[self._at :] + text, 0

    def peek(self) -> Steps[str]:
        """The next character, "" at the end."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def one_of(self, chars: str) -> Steps[str]:
        """Reads a character, which must be one of `chars`."""
        char = yield from self.peek()
        if not char or char not in chars:
            raise NotJson
        return self._read(self._at + 1)

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Reads characters of a class, `[...]*`, as long as there are any."""
        parts = []
        while True:
            match = pattern.match(self._text, self._at)
            assert match is not None
            parts.append(self._read(match.end()))
            if self._at < len(self._text) or self.ended:
                return "".join(parts)
            yield

    def literal(self, text: str, *, or_cut: bool = False) -> Steps[bool]:
        """Reads `text` if it is next, with `or_cut` also its beginning at the end; says whether it did."""
        while len(ahead := self._text[self._at : self._at + len(text)]) < len(text) and text.startswith(ahead):
            if self.ended:
                break
            yield
        if ahead != text and not (or_cut and self.ended and text.startswith(ahead)):
            return False
        self._read(self._at + len(ahead))
        return True

    def rest(self) -> str:
        """Reads all that has arrived."""
        return self._read(len(self._text))

    def before(self, marker: str) -> str:
        """Reads what has arrived and is before the next `marker`, and cannot be its beginning."""
        found = self._text.find(marker, self._at)
        return self._read(found if found >= 0 else len(self._text) - self._num_begun(marker))

    def _num_begun(self, marker: str) -> int:
        """How many characters of `marker` the text ends with."""
        if self.ended:
            return 0
        longest = min(len(marker) - 1, len(self._text) - self._at)
        return next((size for size in range(longest, 0, -1) if self._text.endswith(marker[:size])), 0)

    def string(self) -> Steps[str]:
        """Reads a string; returns it with its quotes."""
        parts = [(yield from self.one_of('"'))]
        while True:
            parts.append((yield from self.run(_UNESCAPED)))
            parts.append((yield from self.one_of('"\\')))
            if parts[-1] == '"':
                return "".join(parts)
            if not (yield from self.peek()):
                raise NotJson
            parts.append(self._read(self._at + 1))

    def value(self) -> Steps[str]:
        """Reads a value."""
        char = yield from self.peek()
        if char == '"':
            return (yield from self.string())
        if char in ("{", "["):
            return (yield from self._nested())
        scalar = yield from self.run(_SCALAR)
        if not scalar:
            raise NotJson
        return scalar

    def _nested(self) -> Steps[str]:
        parts, open_ones = [], []
        while True:
            char = yield from self.peek()
            if char == '"':
                parts.append((yield from self.string()))
            elif char in _CLOSING:
                open_ones.append(_CLOSING[char])
                parts.append(self._read(self._at + 1))
            elif char in ("}", "]"):
                parts.append((yield from self.one_of(open_ones.pop())))
                if not open_ones:
                    return "".join(parts)
            elif char:
                parts.append((yield from self.run(_STRUCTURELESS)))
            else:
                raise NotJson

    def _read(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        if text:
            self._on_read(text)
        return text
