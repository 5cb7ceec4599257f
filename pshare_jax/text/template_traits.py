"""What a chat template writes and what it leaves out, found by rendering marked messages once for each template.

`Tokenizer` keeps the traits of its templates; chat_fitting.py changes chats by them, so that nothing of a chat is lost.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_template import ChatTemplate
from pshare_jax.text.tool_format import FORMATS, ToolFormat, same_calls

# Words that no template contains. Some templates demand ids of nine letters and digits.
_MARK, _NAME, _KEY, _VALUE = "zqmarkqz", "zqnameqz", "zqkeyqz", "zqvalueqz"
_CALL_ID = "zqcall123"
_ARGUMENTS = {_KEY: _VALUE}
_DETECTED = "template"
"""The name of a format that was found in a template and is none of `FORMATS`."""


@dataclass(frozen=True)
class TemplateTraits:
    """One template's traits.

    `call_format` is how it writes an assistant's tool_calls, None if it writes none or in a way that no `ToolFormat`
    describes. With `text_arguments` it wants a call's arguments as JSON text. `shows_tool`: whether it shows a message of role
    tool behind its own calls, and behind calls in an assistant's text. `late_system`: whether a system message may be the
    last. `alternates`: it refuses two user messages in a row. `has_developer`: it knows the role. `closing` is what it writes
    behind an answer.
    """

    writes_tools: bool
    writes_calls: bool
    call_format: ToolFormat | None
    default_format: ToolFormat | None
    text_arguments: bool
    shows_tool: tuple[bool, bool]
    shows_system: bool
    late_system: bool
    has_developer: bool
    alternates: bool
    closing: str


def probe(template: ChatTemplate, variables: Mapping[str, Any], control: Collection[str]) -> TemplateTraits:
    """The traits of a template; `control` are the texts of control tokens, which answers do not contain as text."""
    probed = _Probe(template, variables)
    text_arguments = not probed.writes_call(_ARGUMENTS) and probed.writes_call(json.dumps(_ARGUMENTS))
    arguments = json.dumps(_ARGUMENTS) if text_arguments else _ARGUMENTS
    writes_calls = text_arguments or probed.writes_call(arguments)
    call_format = probed.call_format(arguments, control) if writes_calls else None
    usual = FORMATS["gemma" if "<start_of_turn>" in template.source else "hermes"]
    return TemplateTraits(
        writes_tools=probed.shows([_user("a")], _NAME, tools=[_tool()]),
        writes_calls=writes_calls,
        call_format=call_format,
        default_format=call_format if writes_calls else usual,
        text_arguments=text_arguments,
        shows_tool=(
            writes_calls and probed.shows([_user("a"), _calling(arguments), _TOOL_RESULT]),
            probed.shows([_user("a"), _assistant("b"), _TOOL_RESULT]),
        ),
        shows_system=probed.shows([_system(), _user("a")]),
        late_system=probed.takes_late_system([_user(_VALUE)])
        and probed.takes_late_system([_user("a"), _assistant(_VALUE)])
        and probed.takes_late_system([_user("a"), _assistant("b"), _user(_VALUE)]),
        has_developer=probed.shows([{"role": "developer", "content": _MARK}, _user("a")])
        and "developer" in template.words,
        alternates=probed.text([_user("a"), _user("b")]) is None,
        closing=probed.closing(),
    )


class _Probe:
    """Renders small chats of one template."""

    def __init__(self, template: ChatTemplate, variables: Mapping[str, Any]) -> None:
        self._template, self._variables = template, variables

    def text(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None = None, prompt: bool = True
    ) -> str | None:
        """The rendering, None if the template refuses the chat."""
        try:
            return self._template.render(list(messages), tools, prompt, self._variables)
        except PshareError:
            return None

    def shows(self, messages: Sequence[dict[str, Any]], mark: str = _MARK, tools: list[Any] | None = None) -> bool:
        """Whether the chat's rendering contains the mark."""
        return mark in (self.text(messages, tools) or "")

    def takes_late_system(self, history: Sequence[dict[str, Any]]) -> bool:
        """Whether a system message behind `history`, which ends with `_VALUE`, is written there and changes nothing before."""
        before, end, after = (self.text([*history, _system()]) or "").partition(_VALUE)
        return (
            bool(end)
            and _MARK in after
            and before == (self.text([*history, _user("z")]) or before).partition(_VALUE)[0]
        )

    def writes_call(self, arguments: Any) -> bool:
        """Whether an assistant's call is written whole: with its name, and its arguments not in Python's notation."""
        text = self.text([_user("a"), _calling(arguments)]) or ""
        return all(part in text for part in (_NAME, _KEY, _VALUE)) and repr(_ARGUMENTS) not in text

    def call_format(self, arguments: Any, control: Collection[str]) -> ToolFormat | None:
        """How the template writes a call, read from its rendering."""
        before = self.text([_user("a")])
        # What follows an older call is the same, but some templates write an empty thought before the last answer.
        turns = ([_user("a"), _calling(arguments), _TOOL_RESULT], [_user("a"), _calling(arguments)])
        written = next((text for turn in turns if (text := self.text(turn, prompt=False)) and _NAME in text), None)
        if before is None or written is None or not written.startswith(before):
            return None
        return _read_format(written[len(before) :], self.closing(), control)

    def closing(self) -> str:
        """What the template writes behind an answer."""
        text = self.text([_user("a"), _assistant(_MARK)], prompt=False) or ""
        return text.partition(_MARK)[2]


def _read_format(answer: str, closing: str, control: Collection[str]) -> ToolFormat | None:
    """The format of an answer, which is one call and what closes the turn."""
    found = _find_call(answer)
    if found is None:
        return None
    start_at, end_at, body = found
    start, end = answer[:start_at], answer[end_at:]
    if closing.strip():
        end = end.partition(closing)[0]
    for text in filter(str.strip, control):
        start, end = start.rpartition(text)[2], end.partition(text)[0]
    call = body[0] if isinstance(body, list) else body
    key = next(key for key, value in call.items() if value == _ARGUMENTS)
    start = start.lstrip()
    form = ToolFormat(_DETECTED, start, end if start else "", "list" if isinstance(body, list) else "object", key)
    return next((known for known in FORMATS.values() if same_calls(known, form)), form)


def _find_call(answer: str) -> tuple[int, int, Any] | None:
    """Where the JSON of the probed call starts and ends, and its value."""
    decoder = json.JSONDecoder()
    for at, char in enumerate(answer):
        if char not in "[{":
            continue
        try:
            value, end = decoder.raw_decode(answer, at)
        except ValueError:
            continue
        calls = value if isinstance(value, list) else [value]
        if len(calls) == 1 and isinstance(calls[0], dict) and calls[0].get("name") == _NAME:
            return (at, end, value) if _ARGUMENTS in calls[0].values() else None
    return None


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _system() -> dict[str, Any]:
    return {"role": "system", "content": _MARK}


def _calling(arguments: Any) -> dict[str, Any]:
    call = {"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


def _tool() -> dict[str, Any]:
    schema = {"type": "object", "properties": {_KEY: {"type": "string", "description": "d"}}, "required": [_KEY]}
    return {"type": "function", "function": {"name": _NAME, "description": "d", "parameters": schema}}


_TOOL_RESULT = {"role": "tool", "tool_call_id": _CALL_ID, "name": _NAME, "content": _MARK}
