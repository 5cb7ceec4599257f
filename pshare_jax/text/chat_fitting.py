"""Fits a chat to its template and to the module's style, so that all of it is written: roles, function calls, tools, layout.

`Tokenizer` fits every chat before rendering, in serving and training alike. What a template writes by itself is left to it.
A template that has no place for a message writes nothing of it, without an error, and the model would answer another chat:
`check_shown` refuses that.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_style import ChatStyle
from pshare_jax.text.template_traits import TemplateTraits
from pshare_jax.text.tool_format import ToolFormat, calls_text, same_calls, tools_text


@dataclass(frozen=True)
class Part:
    """A message for the template; `origin` is its index in the request, None for one of ours.

    A `joining` message takes the role user for want of its own; where roles must alternate, it joins its neighbours.
    """

    message: dict[str, Any]
    origin: int | None = None
    joining: bool = False

    @property
    def role(self) -> str:
        """The message's role."""
        return self.message["role"]

    @property
    def text(self) -> str:
        """The message's content."""
        return self.message.get("content") or ""

    def with_text(self, text: str, role: str | None = None) -> "Part":
        """The part with another content, and maybe another role."""
        return replace(self, message={**self.message, "content": text, "role": role or self.role})


@dataclass(frozen=True)
class FittedChat:
    """What the template gets: messages, and the tools that it writes itself."""

    parts: list[Part]
    tools: list[Any] | None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages."""
        return [part.message for part in self.parts]


class ChatFitting:
    """The changes that one template needs for one style; `form` is the format of the style's calls."""

    def __init__(self, traits: TemplateTraits, style: ChatStyle, form: ToolFormat | None) -> None:
        self._traits, self._style, self._form = traits, style, form
        theirs, ours = traits.call_format, style.tool_format
        differs = ours is not None and not (theirs is not None and same_calls(theirs, ours))
        self._writes_calls = form is not None and (differs or not traits.writes_calls)
        # Tools differ between agents as system messages do, so a layout that shares moves both.
        moves = style.system != "first"
        self._writes_tools = form is not None and (differs or moves or not traits.writes_tools)

    def fit(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, num_last: int = 0) -> FittedChat:
        """The chat for the template. The last `num_last` messages, an answer, stay at the end whatever the layout.

        The leading system and developer messages are the request's own; with the layouts `last` and `drop` they do not
        come first.

        Raises:
            PshareError: there are tools, but neither the template nor the style's format can write them; or nothing is
                left of the chat.
        """
        parts = self._known(messages)
        end = len(parts) - num_last
        start = next((i for i, part in enumerate(parts[:end]) if part.role not in ("system", "developer")), end)
        if self._style.system == "drop" and start == end:
            raise PshareError("The task leaves system messages out, and the chat has no other; add a user's message.")
        own = [] if self._style.system == "drop" else parts[:start]
        if tools and self._form is None and not self._traits.writes_tools:
            raise PshareError(
                "The chat template has no place for tools and writes calls in a form of its own; set tool_format."
            )
        if tools and self._writes_tools:
            own, tools = self._with_tools(own, tools), None
        history, answer = parts[start:end], parts[end:]
        if self._style.system == "first" or not history:
            whole = [*own, *history, *answer]
        else:
            whole = [*history, *map(self._late, own), *answer]
        return FittedChat(self._joined(whole), tools)

    def _known(self, messages: Sequence[dict[str, Any]]) -> list[Part]:
        """The messages in roles and fields that the template shows."""
        parts, name_of = [], {}
        for index, message in enumerate(map(_modern, messages)):
            part = Part(message, index)
            if part.role == "developer" and not self._traits.has_developer:
                part = Part({**message, "role": "system"}, index)
            elif part.role == "assistant" and message.get("tool_calls"):
                name_of |= {str(call.get("id")): _name_and_arguments(call)[0] for call in message["tool_calls"]}
                part = Part(self._called(message), index)
            elif part.role == "tool" and not self._traits.shows_tool[self._writes_calls]:
                name = message.get("name") or name_of.get(str(message.get("tool_call_id")), "the call")
                part = Part({"role": "user", "content": f"Result of {name}:\n{part.text}"}, index, joining=True)
            parts.append(part)
        return parts

    def _called(self, message: dict[str, Any]) -> dict[str, Any]:
        """An assistant's message with calls, as fields for the template or as text in our format."""
        calls = message["tool_calls"]
        if self._writes_calls and self._form is not None:
            written = calls_text(self._form, map(_name_and_arguments, calls))
            text = message.get("content") or ""
            separator = "\n" if text and not text.endswith("\n") else ""
            plain = {key: value for key, value in message.items() if key != "tool_calls"}
            return {**plain, "content": f"{text}{separator}{written}"}
        if self._traits.text_arguments:
            return {**message, "tool_calls": [_with_text_arguments(call) for call in calls]}
        return message

    def _with_tools(self, own: list[Part], tools: Sequence[Mapping[str, Any]]) -> list[Part]:
        assert self._form is not None
        text = tools_text(self._form, tools)
        if own:
            *others, last = own
            return [*others, last.with_text(f"{last.text}\n\n{text}" if last.text.strip() else text)]
        if self._traits.shows_system:
            return [Part({"role": "system", "content": text})]
        return [Part({"role": "user", "content": text}, joining=True)]

    def _late(self, part: Part) -> Part:
        """A system message for a place behind the history."""
        if self._traits.late_system:
            return part
        return replace(part.with_text(part.text, "user"), joining=True)

    def _joined(self, parts: list[Part]) -> list[Part]:
        """The parts with `joining` messages joined to user messages beside them, where the template needs it."""
        if not self._traits.alternates:
            return parts
        groups: list[list[Part]] = []
        for part in parts:
            last = groups[-1][-1] if groups else None
            if last is not None and last.role == part.role == "user" and (last.joining or part.joining):
                groups[-1].append(part)
            else:
                groups.append([part])
        return [group[0] if len(group) == 1 else _one_of(group) for group in groups]


def _one_of(group: Sequence[Part]) -> Part:
    """The parts as one, which shows the first one's fields."""
    return group[0].with_text("\n\n".join(part.text for part in group if part.text))


def _modern(message: dict[str, Any]) -> dict[str, Any]:
    """The message with `tool_calls` and role tool for their older forms, `function_call` and role function."""
    if message["role"] == "function":
        return {**message, "role": "tool"}
    call = message.get("function_call")
    if not isinstance(call, dict) or message.get("tool_calls"):
        return message
    plain = {key: value for key, value in message.items() if key != "function_call"}
    return {**plain, "tool_calls": [{"type": "function", "function": call}]}


def _function(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


def _name_and_arguments(call: Mapping[str, Any]) -> tuple[str, Any]:
    function = _function(call)
    return str(function.get("name", "")), function.get("arguments", {})


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = _function(call)
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
        return call
    changed = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": changed} if "function" in call else changed


# --- what a rendering shows ------------------------------------------------------------------------------------------

_SHORT = 16
"""Shorter texts may also stand elsewhere in a rendering, such as in a role's header."""


def check_shown(parts: Sequence[Part], text: str, render: Callable[[list[dict[str, Any]]], str]) -> None:
    """Refuses a rendering, `text`, that shows nothing of a message; `render` renders the chat with other messages.

    Raises:
        PshareError: naming the message.
    """
    if _all_found(parts, text):
        return
    # Templates may trim, cut and escape a text, so only the rendering of plain marks shows what they leave out.
    mark = f"q{secrets.token_hex(4)}q"
    try:
        marked = render([_marked(part.message, f"{mark}{index}z") for index, part in enumerate(parts)])
    except PshareError:
        # The template reads the texts and refuses marks.
        return
    shown = {int(found) for found in re.findall(rf"{mark}(\d+)z", marked, re.IGNORECASE)}
    for index, part in enumerate(parts):
        if part.text.strip() and index not in shown:
            name = index if part.origin is None else part.origin
            raise PshareError(
                f"The chat template does not show message {name}, of role {part.role}; send its text in another role."
            )


def _all_found(parts: Sequence[Part], text: str) -> bool:
    """Whether the messages' texts stand in the rendering in their order."""
    at = 0
    for part in parts:
        wanted = part.text.strip()
        if not wanted:
            continue
        at = text.find(wanted, at)
        if at < 0 or (len(wanted) < _SHORT and part.role not in ("user", "assistant")):
            return False
        at += len(wanted)
    return True


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with the mark for its text, and for the names of its calls: some templates show calls without the text."""
    marked = {**message, "content": mark} if message.get("content", "").strip() else message
    if not isinstance(message.get("tool_calls"), list):
        return marked
    return {**marked, "tool_calls": [_renamed(call, mark) for call in message["tool_calls"]]}


def _renamed(call: dict[str, Any], name: str) -> dict[str, Any]:
    function = call.get("function")
    return {**call, "function": {**function, "name": name}} if isinstance(function, dict) else {**call, "name": name}
