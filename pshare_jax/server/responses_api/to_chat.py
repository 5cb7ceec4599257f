"""Items of a conversation as chat messages, and function tools in the form of a chat.

schema.py is the caller. Each function returns the normal form of a field's value; its ValueError starts with the field's name and
is shown to the client.
"""

from collections.abc import Mapping
from typing import Any

TEXT_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
"""The types of parts that may be sent, each with the field that has its text."""
ROLES = ("user", "assistant", "system", "developer")


def messages_of(value: Any) -> list[dict[str, Any]]:
    """The messages of `input`: a text, or a list of items."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("input must be a string or a list with at least one item.")
    conversation = _Conversation()
    for index, item in enumerate(value):
        conversation.add(f"input.{index}", item)
    return conversation.messages


class _Conversation:
    """Messages from items. An assistant's text and the calls behind it are one message, as a chat's client would send them."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._call_ids: set[str] = set()

    def add(self, name: str, item: Any) -> None:
        """Adds the item at `name`."""
        if not isinstance(item, dict):
            raise ValueError(f"{name} must be an object.")
        kind = item.get("type") or "message"
        if kind == "message":
            self._add_message(name, item)
        elif kind == "function_call":
            self._add_call(name, item)
        elif kind == "function_call_output":
            self._add_output(name, item)
        elif kind == "item_reference":
            raise ValueError(f"{name} is an item_reference, but this server stores no items; send the item itself.")
        elif kind != "reasoning":
            allowed = "message, function_call, function_call_output and reasoning (which is left out)"
            raise ValueError(f"{name} has the type {kind!r}; this server reads items of the types {allowed}.")

    def _add_message(self, name: str, item: dict[str, Any]) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}.")
        self.messages.append({"role": role, "content": _content(f"{name}.content", item.get("content"))})

    def _add_call(self, name: str, item: dict[str, Any]) -> None:
        call_id, function, arguments = (_text(name, item, field) for field in ("call_id", "name", "arguments"))
        call = {"id": call_id, "type": "function", "function": {"name": function, "arguments": arguments}}
        self._call_ids.add(call_id)
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": None})
        self.messages[-1].setdefault("tool_calls", []).append(call)

    def _add_output(self, name: str, item: dict[str, Any]) -> None:
        call_id = _text(name, item, "call_id")
        if call_id not in self._call_ids:
            raise ValueError(
                f"{name}.call_id is {call_id[:80]!r}, which no earlier function_call has; send the conversation's calls too."
            )
        output = _content(f"{name}.output", item.get("output"))
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})


def _text(name: str, item: dict[str, Any], field: str) -> str:
    if not isinstance(text := item.get(field), str):
        raise ValueError(f"{name}.{field} must be a string.")
    return text


def _content(name: str, content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{name} must be a string or a list of parts.")
    return [_part(f"{name}.{index}", part) for index, part in enumerate(content)]


def _part(name: str, part: Any) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ValueError(f"{name} must be an object.")
    kind = part.get("type")
    if kind not in TEXT_PARTS:
        raise ValueError(f"{name} has the type {kind!r}; this model reads text only: {', '.join(TEXT_PARTS)}.")
    return {"type": "text", "text": _text(name, part, TEXT_PARTS[kind])}


def function_tools(value: Any) -> list[dict[str, Any]]:
    """`tools` with all of their fields; a tool that is not a function is refused."""
    if not isinstance(value, list):
        raise ValueError("tools must be a list.")
    return [_function_tool(f"tools.{index}", tool) for index, tool in enumerate(value)]


def _function_tool(name: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise ValueError(f"{name} must be an object.")
    if (kind := tool.get("type")) != "function":
        raise ValueError(f"{name} has the type {kind!r}; this server runs no tools itself, so send functions only.")
    function = _text(name, tool, "name")
    description, parameters, strict = (tool.get(field) for field in ("description", "parameters", "strict"))
    if not isinstance(description, str | None):
        raise ValueError(f"{name}.description must be a string.")
    if not isinstance(parameters, dict | None):
        raise ValueError(f"{name}.parameters must be a JSON schema (an object).")
    if not isinstance(strict, bool | None):
        raise ValueError(f"{name}.strict must be true or false.")
    return {
        "type": "function",
        "name": function,
        "description": description,
        "parameters": parameters,
        "strict": bool(strict),
    }


def chat_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function tool (`function_tools`) as a chat has it."""
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def tool_choice(value: Any) -> str | dict[str, Any]:
    """none, auto, required, or a function."""
    named = isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("name"), str)
    if named:
        return {"type": "function", "name": value["name"]}
    if value not in ("none", "auto", "required"):
        raise ValueError('tool_choice must be none, auto, required or {"type": "function", "name": ...}.')
    return value


def chat_tool_choice(value: str | dict[str, Any]) -> str | dict[str, Any]:
    """A tool choice (`tool_choice`) as a chat has it."""
    return value if isinstance(value, str) else {"type": "function", "function": {"name": value["name"]}}


def text_format(value: Any) -> dict[str, Any]:
    """`text` as an object with a format."""
    if not isinstance(value, dict):
        raise ValueError("text must be an object.")
    form = value.get("format") or {"type": "text"}
    if not isinstance(form, dict):
        raise ValueError("text.format must be an object.")
    if (kind := form.get("type")) not in ("text", "json_object", "json_schema"):
        raise ValueError(f"text.format.type is {kind!r}; it must be text, json_object or json_schema.")
    if kind == "json_schema" and not isinstance(form.get("schema"), dict):
        raise ValueError("text.format.schema must be a JSON schema (an object).")
    return {**value, "format": form}


def chat_format(form: Mapping[str, Any]) -> dict[str, Any]:
    """The format of a text (`text_format`) as a chat's `response_format`."""
    if form["type"] != "json_schema":
        return {"type": form["type"]}
    fields = {name: value for name, value in form.items() if name != "type" and value is not None}
    return {"type": "json_schema", "json_schema": fields}
