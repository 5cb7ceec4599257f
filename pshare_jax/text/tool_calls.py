"""Function calls in an answer's text: an incremental parser, fed with the text as it is generated. Host code.

The server has one `ToolCallParser` for each answer. A whole answer that is pushed at once gives the same text and calls as its
pieces, however it is split.
"""

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby

from pshare_jax.text.json_source import BLANK, BLANKS, JsonSource, NotJson, Steps
from pshare_jax.text.tool_format import ToolFormat


@dataclass(frozen=True)
class CallPiece:
    """A part of the answer's call number `index`. The first piece has the name; the pieces' `arguments` join to JSON text."""

    index: int
    name: str | None = None
    arguments: str = ""


Piece = str | CallPiece
"""A part of an answer: text for the reader, or a part of a call."""

_SEPARATORS = re.compile(r"[ \t\r\n;,]*")
_ARGUMENTS = ("arguments", "parameters")
"""Models confuse the two, so both are understood in every format, beside its own key."""
_FIRST_KEYS = ("name", "type", "id")
"""What a call without a marker may begin with, like its arguments; any other key shows that the answer is other JSON."""


class ToolCallParser:
    """Splits one answer into text and calls.

    A marker is followed by one or more objects, or by a list of objects. A format without a marker has them at the beginning
    of the answer, and only if the first has the name of a known function; any other answer is text, unchanged. Behind a
    marker every name makes a call, so that an agent can tell the model that there is no such function.

    A call's name is given as soon as it is known, then its arguments as the model writes them. What does not become a call is
    given back as text; a call that breaks off behind its name ends there, and what follows is text. Blanks around calls are
    dropped, save those between two texts.
    """

    def __init__(self, form: ToolFormat, names: Collection[str]):
        self._start, self._end, self._names = form.start.strip(), form.end.strip(), names
        self._argument_keys = {form.arguments_key, *_ARGUMENTS}
        self.num_calls = 0
        self.num_broken = 0
        """Markers without a call, and calls whose arguments are not a JSON object."""
        self._source = JsonSource(self._on_read)
        self._held: list[str] | None = None
        """What was read since the call's beginning, as long as it may still become text."""
        self._streams = False
        """Whether what is read are a call's arguments."""
        self._text = _Text()
        self._pieces: list[Piece] = []
        self._parse = self._marked() if self._start else self._unmarked()

    def push(self, text: str) -> list[Piece]:
        """The parts of the answer that are known after `text`."""
        self._source.feed(text)
        next(self._parse, None)
        pieces, self._pieces = self._pieces, []
        return _joined(pieces)

    def finish(self) -> list[Piece]:
        """The remaining parts, when no text follows."""
        self._source.ended = True
        pieces = self.push("")
        rest = self._text.rest()
        return [*pieces, rest] if rest else pieces

    def _marked(self) -> Steps[None]:
        while (yield from self._text_before_start()):
            num_before = self.num_calls
            try:
                yield from self._body()
            except NotJson:
                self._give_back()
            if self.num_calls == num_before:
                self.num_broken += 1
            else:
                yield from self._source.run(BLANKS)
                yield from self._source.literal(self._end, or_cut=True)

    def _unmarked(self) -> Steps[None]:
        self._held = []
        try:
            yield from self._body()
        except NotJson:
            self._give_back()
        while not self._source.ended:
            self._show(self._source.rest())
            yield
        self._show(self._source.rest())

    def _text_before_start(self) -> Steps[bool]:
        """Shows the text before the next marker, and holds the marker. False: the answer has ended."""
        ended = False
        while not ended:
            # The answer may end while the marker is awaited.
            ended = self._source.ended
            self._show(self._source.before(self._start))
            self._held = []
            if (yield from self._source.literal(self._start)):
                return True
            self._held = None
        return False

    def _body(self) -> Steps[None]:
        """One or more objects or lists; what separates them is dropped once the first is known to be a call."""
        yield from self._source.run(BLANKS)
        yield from self._object_or_list()
        while True:
            yield from self._source.run(_SEPARATORS)
            if (yield from self._source.peek()) not in ("{", "["):
                return
            yield from self._object_or_list()

    def _object_or_list(self) -> Steps[None]:
        if (yield from self._source.peek()) != "[":
            yield from self._call(listed=False)
            return
        self._hold()
        yield from self._source.one_of("[")
        num_before = self.num_calls
        while True:
            yield from self._source.run(BLANKS)
            yield from self._call(listed=self.num_calls > num_before)
            yield from self._source.run(BLANKS)
            if (yield from self._source.one_of(",]")) == "]":
                return

    def _call(self, *, listed: bool) -> Steps[None]:
        """One object. `listed`: it follows a call in a list, so it is a call if it has a name."""
        self._hold()
        yield from self._source.one_of("{")
        call = _Call()
        try:
            yield from self._members(call, listed)
        finally:
            self._streams = False
            self.num_broken += call.named and not call.complete
        if not call.named:
            raise NotJson

    def _members(self, call: "_Call", listed: bool) -> Steps[None]:
        source = self._source
        while True:
            yield from source.run(BLANKS)
            key = _text_of((yield from source.string()))
            if not (self._start or call.named or key in _FIRST_KEYS or key in self._argument_keys):
                raise NotJson
            yield from source.run(BLANKS)
            yield from source.one_of(":")
            yield from source.run(BLANKS)
            if key == "name" and not call.named:
                self._name(call, _text_of((yield from source.value())), listed)
            elif key in self._argument_keys and call.arguments is None:
                yield from self._read_arguments(call)
            else:
                yield from source.value()
            yield from source.run(BLANKS)
            if (yield from source.one_of(",}")) == "}":
                break
        if call.named and call.arguments is None:
            call.arguments = "{}"
            self._pieces.append(CallPiece(self.num_calls - 1, arguments="{}"))

    def _name(self, call: "_Call", name: str, listed: bool) -> None:
        if not name or not (self._start or listed or name in self._names):
            raise NotJson
        call.named = True
        self._held = None
        self._text.call()
        self._pieces.append(CallPiece(self.num_calls, name))
        self.num_calls += 1
        if call.arguments is not None:
            self._pieces.append(CallPiece(self.num_calls - 1, arguments=call.arguments))

    def _read_arguments(self, call: "_Call") -> Steps[None]:
        is_object = (yield from self._source.peek()) == "{"
        self._streams = is_object and call.named
        raw = yield from self._source.value()
        call.arguments = raw if is_object else _unwrapped(raw)
        if call.named and not self._streams:
            self._pieces.append(CallPiece(self.num_calls - 1, arguments=call.arguments))
        self._streams = False

    def _on_read(self, text: str) -> None:
        if self._held is not None:
            self._held.append(text)
        elif self._streams:
            self._pieces.append(CallPiece(self.num_calls - 1, arguments=text))

    def _hold(self) -> None:
        if self._held is None:
            self._held = []

    def _give_back(self) -> None:
        held, self._held = self._held, None
        self._show("".join(held or ()))

    def _show(self, text: str) -> None:
        if shown := self._text.add(text):
            self._pieces.append(shown)


class _Call:
    """What is known of the call that is read."""

    def __init__(self) -> None:
        self.named = False
        self.arguments: str | None = None

    @property
    def complete(self) -> bool:
        """Whether its arguments are a JSON object."""
        return self.arguments is not None and isinstance(_loaded(self.arguments), dict)


class _Text:
    """The text for the reader: blanks wait until it is known whether a call follows."""

    def __init__(self) -> None:
        self._blanks: list[str] = []
        self._begun = False
        self._takes_blanks = True
        self._after_call = False

    def add(self, text: str) -> str:
        """The text that can be shown after `text`."""
        words = text.strip(BLANK)
        before = text[: len(text) - len(text.lstrip(BLANK))]
        if before and self._takes_blanks:
            self._blanks.append(before)
        if not words:
            return ""
        shown = "".join([*self._blanks, words])
        self._blanks = [after] if (after := text[len(before) + len(words) :]) else []
        self._begun = self._takes_blanks = True
        self._after_call = False
        return shown

    def call(self) -> None:
        """A call follows. The blanks before it stay where there is text on both sides."""
        if not self._begun:
            self._blanks = []
        self._takes_blanks = self._begun and not self._blanks
        self._after_call = True

    def rest(self) -> str:
        """The blanks at the answer's end, unless a call is before them."""
        return "" if self._after_call else "".join(self._blanks)


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbours that are both text, or both arguments of one call, as one piece."""
    joined: list[Piece] = []
    for kind, group in groupby(pieces, lambda piece: None if isinstance(piece, str) else (piece.index, piece.name)):
        if kind is None:
            joined.append("".join(piece for piece in group if isinstance(piece, str)))
        else:
            joined.append(CallPiece(*kind, "".join(piece.arguments for piece in group if isinstance(piece, CallPiece))))
    return joined


def _text_of(raw: str) -> str:
    text = _loaded(raw)
    if not isinstance(text, str):
        raise NotJson
    return text


def _unwrapped(raw: str) -> str:
    """Arguments that are no object. A string may hold the object, and null or "" means none; the rest stays as written."""
    if raw in ("null", '""'):
        return "{}"
    value = _loaded(raw)
    return value if isinstance(value, str) and isinstance(_loaded(value), dict) else raw


def _loaded(text: str) -> object:
    """The value of JSON text, None if it is not valid."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
