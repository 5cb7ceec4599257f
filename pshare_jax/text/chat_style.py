"""How a module reads and writes its prompts, beyond the base's template; the same in training, evaluation and serving."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pshare_jax.errors import PshareError
from pshare_jax.text.chat_template import ChatTemplate
from pshare_jax.text.tool_format import ToolFormat, format_value, parse_format

System = Literal["first", "last", "drop"]


@dataclass(frozen=True)
class ChatStyle:
    """`tool_format` None: the template's own, if it has one. `system`: where a request's own system message is rendered
    (`last`: behind the history, so that agents with different ones share it; `drop`: nowhere, the role is in the weights).

    `template` is the source of the module's own chat template (None: the base's). A module with a `text_prompt` reads no
    chats but texts: that pattern with the question in place of {prompt}.
    """

    tool_format: ToolFormat | None = None
    system: System = "first"
    template: str | None = None
    text_prompt: str | None = None

    def text(self, question: str) -> str:
        """A question as the text prompt that the module reads, for /v1/completions."""
        return question if self.text_prompt is None else self.text_prompt.replace(PROMPT, question)


PROMPT = "{prompt}"
"""What stands for the question in a text prompt."""


StyleOf = Callable[[str], ChatStyle]
"""Looks up a task's style."""


def plain_style(task: str) -> ChatStyle:
    """The style of tasks that have none of their own."""
    return ChatStyle()


@dataclass(frozen=True)
class ChatLayout:
    """The `layout` of a config: where a chat's own system message is rendered, as `ChatStyle.system`."""

    system: System = "first"


def parse_style(
    tool_format: Any, layout: Any, key: str = "", *, template: Any = None, text_prompt: Any = None
) -> ChatStyle:
    """The style of the settings `tool_format`, `layout` ({"system": ...}), `template` (a source) and `text_prompt`, each of
    which may be None.

    Raises:
        PshareError: naming the setting, below `key`.
    """
    form = None if tool_format is None else parse_format(tool_format, f"{key}tool_format")
    if template is not None:
        _check_template(template, key)
    if text_prompt is not None and (not isinstance(text_prompt, str) or text_prompt.count(PROMPT) != 1):
        raise PshareError(f"{key}text_prompt must be text with {PROMPT} in it once, not {text_prompt!r}.")
    if text_prompt is not None and template is not None:
        raise PshareError(
            f"{key}text_prompt is for modules that read no chats; leave out either it or the chat template."
        )
    return ChatStyle(form, _system(layout, key), template, text_prompt)


def _check_template(template: Any, key: str) -> None:
    if not isinstance(template, str):
        raise PshareError(f"{key}template must be the text of a chat template, not {template!r}.")
    try:
        # Parses it.
        _ = ChatTemplate(template).words
    except PshareError as error:
        raise PshareError(f"{key}chat_template: {error}") from None


def _system(layout: Any, key: str) -> System:
    if layout is None:
        return "first"
    if not isinstance(layout, Mapping) or set(layout) - {"system"}:
        raise PshareError(f"{key}layout must be an object with the key system, such as {{system: last}}.")
    system = layout.get("system", "first")
    if system not in get_args(System):
        raise PshareError(f"{key}layout.system must be {', '.join(get_args(System)[:-1])} or drop, not {system!r}.")
    return system


def style_values(style: ChatStyle) -> dict[str, Any]:
    """The settings that differ from a plain style, as `parse_style` reads them."""
    values: dict[str, Any] = {}
    if style.tool_format is not None:
        values["tool_format"] = format_value(style.tool_format)
    if style.system != "first":
        values["layout"] = {"system": style.system}
    if style.template is not None:
        values["template"] = style.template
    if style.text_prompt is not None:
        values["text_prompt"] = style.text_prompt
    return values


# --- chat templates for bases without one ----------------------------------------------------------------------------

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "plain": """\
{% for message in messages %}
{{ message.role | capitalize + ':\\n' + message.content }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% endif %}
{{ '\\n\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ 'Assistant:\\n' }}
{%- endif %}
""",
}
"""The templates that are known by name. `plain` needs no control tokens but eos, `chatml` has its own."""


def read_template(value: str | None, key: str) -> str | None:
    """The source of a setting: a name of `TEMPLATES`, a file, or the source itself, which contains {{ or {%.

    Raises:
        PshareError: naming `key`, there is no such file.
    """
    if value is None:
        return None
    return TEMPLATES.get(value) or (value if "{{" in value or "{%" in value else _file(value, key))


def _file(value: str, key: str) -> str:
    try:
        return Path(value).expanduser().read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise PshareError(
            f"{key} must be {', '.join(TEMPLATES)} or the file of a Jinja template, not {value!r}: {reason}."
        ) from None
