"""How a module reads and writes chats, beyond the base's template; the same in training and serving."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pshare_jax.errors import PshareError
from pshare_jax.text.tool_format import ToolFormat, format_value, parse_format

System = Literal["first", "last", "drop"]


@dataclass(frozen=True)
class ChatStyle:
    """`tool_format` None: the template's own, if it has one. `system`: where a request's own system message is rendered
    (`last`: behind the history, so that agents with different ones share it; `drop`: nowhere, the role is in the weights).
    """

    tool_format: ToolFormat | None = None
    system: System = "first"


StyleOf = Callable[[str], ChatStyle]
"""Looks up a task's style."""


def plain_style(task: str) -> ChatStyle:
    """The style of tasks that have none of their own."""
    return ChatStyle()


@dataclass(frozen=True)
class ChatLayout:
    """The `layout` of a config: where a chat's own system message is rendered, as `ChatStyle.system`."""

    system: System = "first"


def parse_style(tool_format: Any, layout: Any, key: str = "") -> ChatStyle:
    """The style of the settings `tool_format` and `layout` ({"system": ...}), either of which may be None.

    Raises:
        PshareError: naming the setting, below `key`.
    """
    form = None if tool_format is None else parse_format(tool_format, f"{key}tool_format")
    if layout is None:
        return ChatStyle(form)
    if not isinstance(layout, Mapping) or set(layout) - {"system"}:
        raise PshareError(f"{key}layout must be an object with the key system, such as {{system: last}}.")
    system = layout.get("system", "first")
    if system not in get_args(System):
        raise PshareError(f"{key}layout.system must be {', '.join(get_args(System)[:-1])} or drop, not {system!r}.")
    return ChatStyle(form, system)


def style_values(style: ChatStyle) -> dict[str, Any]:
    """The settings that differ from a plain style, as `parse_style` reads them."""
    values: dict[str, Any] = {}
    if style.tool_format is not None:
        values["tool_format"] = format_value(style.tool_format)
    if style.system != "first":
        values["layout"] = {"system": style.system}
    return values
