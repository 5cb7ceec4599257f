"""How a model writes function calls: the one description that rendering, parsing and constraining share. Host code.

A decode module's manifest names its format, since the module knows it from training; else it is found in the chat template
(template_traits.py). Templates without a place for tools get our text about them (`tools_text`, chat_fitting.py).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from pshare_jax.errors import PshareError

Body = Literal["object", "list"]


@dataclass(frozen=True)
class ToolFormat:
    """A call format. The answer is text, then `start`, a body and `end`, once for each call (`object`) or once (`list`).

    `object`: the body is one call, {"name": ..., ARGUMENTS: {...}}. `list`: the body is a JSON list of all calls. ARGUMENTS is
    the key `arguments_key`. `start` and `end` may be empty: then the body begins the answer, and ends where its JSON ends.
    """

    name: str
    start: str = ""
    end: str = ""
    body: Body = "object"
    arguments_key: str = "arguments"


FORMATS = {
    form.name: form
    for form in (
        ToolFormat("hermes", "<tool_call>\n", "\n</tool_call>"),
        ToolFormat("llama3", arguments_key="parameters"),
        ToolFormat("gemma", arguments_key="parameters"),
        ToolFormat("json_list", body="list"),
    )
}
"""The formats that are known by name."""

CUSTOM = "custom"
"""The name of formats that are given by their parts."""
_PARTS = ("start", "end", "body", "arguments_key")


def parse_format(value: Any, key: str) -> ToolFormat:
    """The format of a setting: a known name, or an object with some of start, end, body, arguments_key.

    Raises:
        PshareError: naming `key`, the setting.
    """
    if isinstance(value, str):
        if value not in FORMATS:
            raise PshareError(
                f"{key} has the unknown name {value!r}; use {', '.join(FORMATS)}, or an object with {', '.join(_PARTS)}."
            )
        return FORMATS[value]
    if not isinstance(value, Mapping):
        raise PshareError(f"{key} must be a name ({', '.join(FORMATS)}) or an object with {', '.join(_PARTS)}.")
    for name, part in value.items():
        if name not in _PARTS:
            raise PshareError(f"{key} has the unknown key {name!r}; it takes {', '.join(_PARTS)}.")
        if not isinstance(part, str):
            raise PshareError(f"{key}.{name} must be text, not {part!r}.")
    if value.get("body", "object") not in get_args(Body):
        raise PshareError(f"{key}.body must be object or list, not {value['body']!r}.")
    form = ToolFormat(CUSTOM, **value)
    _check(form, key)
    return form


def _check(form: ToolFormat, key: str) -> None:
    if form.arguments_key in ("", "name"):
        raise PshareError(f"{key}.arguments_key must be a key other than name, such as arguments.")
    if form.start and not form.start.strip():
        raise PshareError(f"{key}.start must contain more than blanks, or be empty.")
    if form.end.strip() and not form.start:
        raise PshareError(f"{key}.end needs a start; set {key}.start too.")


def format_value(form: ToolFormat) -> str | dict[str, str]:
    """The setting that `parse_format` reads as `form`: its name, or its parts."""
    if FORMATS.get(form.name) == form:
        return form.name
    return {name: part for name, part in asdict(form).items() if name in _PARTS}


def same_calls(one: ToolFormat, other: ToolFormat) -> bool:
    """Whether two formats write calls in the same way, whatever their names."""
    return all(getattr(one, part) == getattr(other, part) for part in _PARTS)


def as_shown(form: ToolFormat, control: Iterable[str]) -> ToolFormat:
    """The format as an answer's text shows it: `control`, the texts of control tokens, are missing there."""
    shown = with_stand_ins(form, dict.fromkeys(control, ""))
    return shown if shown.start.strip() else replace(shown, start="", end="")


def with_stand_ins(form: ToolFormat, stand_ins: Mapping[str, str]) -> ToolFormat:
    """The format with other texts for parts of its markers, such as control tokens."""
    start, end = form.start, form.end
    for text, other in stand_ins.items():
        start, end = start.replace(text, other), end.replace(text, other)
    return replace(form, start=start, end=end)


def calls_text(form: ToolFormat, calls: Iterable[tuple[str, Any]]) -> str:
    """Calls, (name, arguments), as an answer in this format writes them."""
    bodies = [{"name": name, form.arguments_key: arguments} for name, arguments in calls]
    written = [bodies] if form.body == "list" else bodies
    return "\n".join(f"{form.start}{json.dumps(body, ensure_ascii=False)}{form.end}" for body in written)


# --- what a prompt says about tools ----------------------------------------------------------------------------------

# A module is trained on these words and served with them, so a change of them needs new modules.
_EXAMPLE = ("function", {"parameter": "value"})
_LIST = """\
You call functions. You have these:
{functions}
Answer with the calls that the request needs as a JSON list and nothing else, like this:
{example}"""
_OBJECT = """\
You can call functions. You have these:
{functions}
If the request needs calls, write each of them like this:
{example}"""
# The form of Google's guide to function calling with Gemma 3.
_GEMMA = """\
You have access to functions. If you decide to invoke any of the function(s), you MUST put it in the format of
{example}

You SHOULD NOT include any other text in the response if you call a function
{functions}"""


def tools_text(form: ToolFormat, tools: Sequence[Mapping[str, Any]]) -> str:
    """What a system message says about `tools` (OpenAI's list): a function a line, and a call in this format as example."""
    text = _GEMMA if form.name == "gemma" else _LIST if form.body == "list" else _OBJECT
    listed = "\n".join(json.dumps(_described(tool), ensure_ascii=False) for tool in tools)
    return text.format(functions=listed, example=calls_text(form, [_EXAMPLE]))


def _described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Name, description and parameters in this order, so that a prompt does not depend on the client's order or extras."""
    function = tool.get("function", tool)
    known = function if isinstance(function, Mapping) else {}
    return {key: known[key] for key in ("name", "description", "parameters") if known.get(key) is not None}
