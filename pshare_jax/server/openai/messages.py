"""The message of a chat's answer: its text, split into content and function calls, as OpenAI's deltas and as a whole.

Each choice has an `AnswerParts` of its own, which the other forms of responses use too, and a `ChatMessage`.
"""

import uuid
from collections.abc import Iterable
from typing import Any

from pshare_jax.server.openai.tools import CallRules
from pshare_jax.text.tool_calls import CallPiece, Piece, ToolCallParser
from pshare_jax.text.tool_format import ToolFormat


class AnswerParts:
    """Splits the text of one answer; without rules all of it is text.

    If at most one call is allowed, the answer ends behind its first call.
    """

    def __init__(self, rules: CallRules | None, form: ToolFormat | None):
        self._parser = ToolCallParser(form, rules.names) if rules is not None and form is not None else None
        self._single = rules is not None and rules.single
        self._called = self._ended = False

    @property
    def num_calls(self) -> int:
        """The calls so far."""
        num = 0 if self._parser is None else self._parser.num_calls
        return min(num, 1) if self._single else num

    @property
    def num_broken(self) -> int:
        """The calls so far that could not be read."""
        return 0 if self._parser is None else self._parser.num_broken

    def reason(self, reason: str | None) -> str | None:
        """Why the answer ended, from the engine's reason: what was cut behind the only call is no part of it."""
        return "stop" if reason == "length" and self._ended else reason

    def push(self, text: str, *, last: bool = False) -> list[Piece]:
        """The parts that are known after `text`; with `last` all of the rest."""
        if self._parser is None:
            return [text] if text else []
        pieces = self._parser.push(text)
        if last:
            pieces += self._parser.finish()
        return list(self._first_call(pieces)) if self._single else pieces

    def _first_call(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        for piece in pieces:
            is_first = isinstance(piece, CallPiece) and piece.index == 0
            self._ended = self._ended or (self._called and not is_first)
            self._called = self._called or is_first
            if not self._ended:
                yield piece


def call_counts(rules: CallRules | None, answers: Iterable[AnswerParts]) -> dict[str, int]:
    """Fields of the request log: the calls that were read, and those that could not be; none if nothing may be called."""
    if rules is None:
        return {}
    answers = list(answers)
    return {
        "tool_calls": sum(answer.num_calls for answer in answers),
        "broken_calls": sum(answer.num_broken for answer in answers),
    }


class ChatMessage:
    """A choice's message, from its text."""

    def __init__(self, rules: CallRules | None, form: ToolFormat | None):
        self.parts = AnswerParts(rules, form)
        self._legacy = rules is not None and rules.legacy

    def deltas(self, text: str, *, last: bool) -> list[dict[str, Any]]:
        """What `text` adds to a streamed message; with `last` nothing follows."""
        return [self._delta(piece) for piece in self.parts.push(text, last=last)]

    def whole(self, text: str) -> dict[str, Any]:
        """The message of an answer with this text. Its content is null if there are only calls."""
        content, functions = "", []
        for piece in self.parts.push(text, last=True):
            if isinstance(piece, str):
                content += piece
            elif piece.name is not None:
                functions.append({"name": piece.name, "arguments": ""})
            else:
                functions[-1]["arguments"] += piece.arguments
        message = {"role": "assistant", "content": content if content or not functions else None}
        if not functions:
            return message
        if self._legacy:
            return {**message, "function_call": functions[0]}
        calls = [{"id": _call_id(), "type": "function", "function": function} for function in functions]
        return {**message, "tool_calls": calls}

    def finish_reason(self, reason: str | None) -> str | None:
        """The engine's reason, or for an ended answer with calls that it has some, also where a function was named:
        OpenAI then says stop, but several agent frameworks run functions only if they read tool_calls.
        """
        reason = self.parts.reason(reason)
        if reason != "stop" or not self.parts.num_calls:
            return reason
        return "function_call" if self._legacy else "tool_calls"

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, str):
            return {"content": piece}
        function = {"arguments": piece.arguments}
        if piece.name is not None:
            function = {"name": piece.name, **function}
        if self._legacy:
            return {"function_call": function}
        head = {} if piece.name is None else {"id": _call_id(), "type": "function"}
        return {"tool_calls": [{"index": piece.index, **head, "function": function}]}


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
