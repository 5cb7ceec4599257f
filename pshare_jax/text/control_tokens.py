"""Keeps text that a client sent from becoming control tokens of the prompt.

A template cannot tell its own `<|im_end|>` from one inside a message. Before rendering, `Tokenizer.encode_chat` has the
control text inside messages broken up with private-use twins of single characters (`broken`), and learns which control
tokens the template writes on its own from a second rendering of fully disguised messages (`disguised`).
"""

import json
import re
from collections.abc import Collection
from itertools import islice
from typing import Any

from pshare_jax.text.chat_template import ROLES, map_strings

# Private-use planes 15 and 16: no tokenizer's control token, no normaliser's business, rare in real text.
_TWINS = range(0xF0000, 0x10FFFD)

# Field names and values of the chat format that templates branch on; disguising them would only change the branch.
_FORMAT_WORDS = frozenset(
    (
        *ROLES,
        *("role", "content", "name", "type", "id", "tool_calls", "tool_call_id", "function", "arguments"),
        *("reasoning_content", "thinking", "reasoning", "parameters", "properties", "required", "description"),
        *("text", "object", "array", "string", "number", "integer", "boolean", "null"),
    )
)


class ControlText:
    """The texts of one tokenizer's control tokens, and what hides them."""

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = [text for text in texts if text.strip()]
        self._alphabet = sorted(set("".join(self._texts)) - set(" \t\r\n"))
        alternatives = "|".join(re.escape(text) for text in self._texts)
        # A lookahead, so that overlapping occurrences are all found; the group is the character that gets the twin.
        self._pattern = re.compile(rf"(?={alternatives})(\s*)(\S)") if self._texts else re.compile(r"(?!)")

    def inside(self, value: Any) -> bool:
        """Whether any text in `value` (plain data) holds a control token's text."""
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, dict):
            return any(self.inside(key) or self.inside(item) for key, item in value.items())
        return isinstance(value, list) and any(self.inside(item) for item in value)

    def twins(self, *taken: Any) -> "Twins":
        """Twins for this tokenizer's control characters that occur nowhere in `taken` (plain data)."""
        used = set(json.dumps(taken, ensure_ascii=False))
        free = islice((char for char in map(chr, _TWINS) if char not in used), len(self._alphabet))
        return Twins(dict(zip(self._alphabet, free, strict=True)), self._pattern, self._texts)


class Twins:
    """A choice of twins for one request: character -> private-use character, one to one, so lengths stay the same."""

    def __init__(self, twin_of: dict[str, str], pattern: re.Pattern[str], texts: list[str]) -> None:
        self._pattern, self._texts = pattern, texts
        self._twin_of = twin_of
        self._disguise = str.maketrans(twin_of)
        self._restore = str.maketrans({twin: char for char, twin in twin_of.items()})

    def broken(self, value: Any) -> Any:
        """`value` (plain data) with one character of each control text replaced by its twin."""
        return map_strings(value, lambda text: self._pattern.sub(lambda at: at[1] + self._twin_of[at[2]], text))

    def disguised(self, value: Any, known: Collection[str]) -> Any:
        """`value` without any control character, so that nothing in it can become part of a control token.

        Words that the template itself mentions (`known`) stay, unless they hold a control token or are part of one: a
        template that writes `'<' + tag + '>'` must not complete one from them.
        """
        return map_strings(value, lambda text: text if self._stays(text, known) else text.translate(self._disguise))

    def restored(self, text: str) -> str:
        """`text` with every twin turned back."""
        return text.translate(self._restore)

    def _stays(self, text: str, known: Collection[str]) -> bool:
        if text in _FORMAT_WORDS:
            return True
        return text in known and not any(text in control or control in text for control in self._texts)
