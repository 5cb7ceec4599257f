"""The functions that a chat may call: checks of `tools` and its companions, with OpenAI's older `functions`, and their meaning.

schema.py uses the checks as those of fields.py; each ValueError starts with the field's name and is shown to the client.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_TOOLS = 128
_NAME = re.compile(r"[\w.:/-]{1,128}")
"""OpenAI allows 64 letters, digits, _ and -; frameworks and MCP servers also send names with dots, colons and slashes."""
_WORDS = ("none", "auto", "required")

_FUNCTION_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"^[\w.:/-]{1,128}$"},
        "description": {"type": "string"},
        "parameters": {"type": "object"},
        "strict": {"type": "boolean"},
    },
    "required": ["name"],
}
_NAMED_SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def _tagged(function: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"type": {"const": "function"}, "function": function},
        "required": ["type", "function"],
    }


TOOLS_SCHEMA = {"type": "array", "maxItems": MAX_TOOLS, "items": _tagged(_FUNCTION_SCHEMA)}
CHOICE_SCHEMA = {"anyOf": [{"enum": list(_WORDS)}, _tagged(_NAMED_SCHEMA)]}
FUNCTIONS_SCHEMA = {"type": "array", "maxItems": MAX_TOOLS, "items": _FUNCTION_SCHEMA}
FUNCTION_CALL_SCHEMA = {"anyOf": [{"enum": ["none", "auto"]}, _NAMED_SCHEMA]}
"""The fields' schemas in /openapi.json."""


@dataclass(frozen=True)
class CallRules:
    """What an answer may call. `choice`: auto, required, or the name of the one function to call.

    `single`: at most one call. `legacy`: the client sent `functions`, so it reads `function_call`.
    """

    tools: Sequence[dict[str, Any]]
    choice: str = "auto"
    single: bool = False
    legacy: bool = False

    @property
    def field(self) -> str:
        """The field that has the functions."""
        return "functions" if self.legacy else "tools"

    @property
    def names(self) -> frozenset[str]:
        """The names of the functions."""
        return frozenset(tool["function"]["name"] for tool in self.tools)


def check_tools(value: Any) -> list[dict[str, Any]]:
    """Function tools with different names; other types of tools, which OpenAI runs itself, are refused by name."""
    if not isinstance(value, list):
        raise ValueError("tools must be a list of tools.")
    for index, tool in enumerate(value):
        name = f"tools.{index}"
        if not isinstance(tool, dict):
            raise ValueError(f"{name} must be an object with type and function.")
        if (kind := tool.get("type")) != "function":
            raise ValueError(f"{name} has the type {kind!r:.40}; this server offers the type function only.")
        _check_function(f"{name}.function", tool.get("function"))
    _check_names("tools", [tool["function"]["name"] for tool in value])
    return value


def check_functions(value: Any) -> list[dict[str, Any]]:
    """The older form of `tools`: functions without a type."""
    if not isinstance(value, list):
        raise ValueError("functions must be a list of functions.")
    for index, function in enumerate(value):
        _check_function(f"functions.{index}", function)
    _check_names("functions", [function["name"] for function in value])
    return value


def _check_function(name: str, function: Any) -> None:
    if not isinstance(function, dict):
        raise ValueError(f"{name} must be an object with a name.")
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise ValueError(f"{name}.name must have 1 to 128 letters, digits, or characters of _.:/-.")
    for field, kind, word in (("description", str, "a string"), ("parameters", dict, "an object (a JSON schema)")):
        if not isinstance(function.get(field), kind | None):
            raise ValueError(f"{name}.{field} must be {word}.")
    if not isinstance(function.get("strict"), bool | None):
        raise ValueError(f"{name}.strict must be true or false.")


def _check_names(field: str, names: Sequence[str]) -> None:
    if len(names) > MAX_TOOLS:
        raise ValueError(f"{field} has {len(names)} entries; at most {MAX_TOOLS} are allowed.")
    if twice := next((name for index, name in enumerate(names) if name in names[:index]), None):
        raise ValueError(f"{field} has two functions with the name {twice!r}; give each a name of its own.")
    if word := next((name for name in names if name in _WORDS), None):
        raise ValueError(f"{field} has a function with the name {word!r}, which is a value of tool_choice; rename it.")


def check_tool_choice(value: Any) -> str:
    """none, auto, required, or the name of a function."""
    if value in _WORDS:
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "function"):
        raise ValueError(f"tool_choice has the type {kind!r:.40}; this server offers the type function only.")
    name = _named(value.get("function")) if kind else None
    if name is None:
        example = '{"type": "function", "function": {"name": ...}}'
        raise ValueError(f"tool_choice must be none, auto, required or {example}.")
    return name


def check_function_call(value: Any) -> str:
    """The older form of `tool_choice`: none, auto, or the name of a function."""
    if value in ("none", "auto"):
        return value
    if (name := _named(value)) is None:
        raise ValueError('function_call must be none, auto or {"name": ...}.')
    return name


def _named(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else None
    return name if isinstance(name, str) and name not in _WORDS else None


def call_rules(
    tools: Sequence[dict[str, Any]], choice: str, parallel: bool, functions: Sequence[dict[str, Any]], called: str
) -> CallRules | None:
    """What the fields mean together; `functions` and `called` (function_call) are the older form. None: nothing to call."""
    if tools and functions:
        raise ValueError("functions is the older form of tools; send only one of them.")
    if functions or called not in ("none", "auto"):
        field, others = "function_call", "functions"
        rules = CallRules(modern_tools(functions), called, single=True, legacy=True)
    else:
        field, others = "tool_choice", "tools"
        rules = CallRules(tools, choice, single=not parallel)
    if rules.choice not in ("none", "auto") and not rules.tools:
        raise ValueError(f"{field} asks for a call, but {others} has no function; send {others} too.")
    if rules.choice not in (*_WORDS, *rules.names):
        raise ValueError(f"{field} names the function {rules.choice!r}, which is not in {others}.")
    return rules if rules.tools and rules.choice != "none" else None


def modern_tools(functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Functions of the older form as `tools`."""
    return [{"type": "function", "function": function} for function in functions]
