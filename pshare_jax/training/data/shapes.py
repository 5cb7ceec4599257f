"""Records of data sets that people have, as the records that training reads: messages, or prompt and completion.

A source's `shape` names one of `SHAPES`; its `columns` rename fields before that. `prepare.py` calls `shaped`.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pshare_jax.training.data.bfcl import answer_message
from pshare_jax.training.data.records import Dropped

Fields = Mapping[str, Any]


class Shape(NamedTuple):
    """The fields that a record must have, the record that training reads, and the fields that it may have."""

    needs: tuple[str, ...]
    convert: Callable[[Fields], dict[str, Any]]
    maybe: tuple[str, ...] = ()


def shaped(record: Any, shape: str | None, columns: Mapping[str, str]) -> Any:
    """The record that training reads.

    Raises:
        Dropped: a column or field is missing; without a shape, the reason names the shape to set.
    """
    if not isinstance(record, dict):
        return record
    record = renamed(record, columns)
    if shape is None:
        _check_plain(record)
        return record
    lacking = [name for name in SHAPES[shape].needs if name not in record]
    if lacking:
        raise Dropped(
            "not of the shape", f"A record of shape {shape} needs {' and '.join(lacking)}; this has {_listed(record)}."
        )
    return SHAPES[shape].convert(record)


def renamed(record: Fields, columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with the names that `columns` gives to its fields.

    Raises:
        Dropped: it lacks one of them.
    """
    missing = [theirs for theirs in columns.values() if theirs not in record]
    if missing:
        raise Dropped("no such column", f"The record has no field {missing[0]!r}; it has {_listed(record)}.")
    taken = set(columns.values())
    return {name: value for name, value in record.items() if name not in taken} | {
        ours: record[theirs] for ours, theirs in columns.items()
    }


def _check_plain(record: Fields) -> None:
    if "messages" in record or {"prompt", "completion"} <= record.keys():
        return
    fitting = [name for name, shape in SHAPES.items() if all(field in record for field in shape.needs)]
    # The shape with the most fields says most about the record.
    best = max(fitting, key=lambda name: len(SHAPES[name].needs), default=None)
    advice = (
        f"set shape: {best} in this source"
        if best
        else "set columns in this source, as columns: {prompt: a, completion: b}"
    )
    raise Dropped(
        "no messages", f"A record must have messages, or prompt and completion; this has {_listed(record)}: {advice}."
    )


def _listed(record: Fields) -> str:
    names = [str(name) for name in record]
    return ", ".join(names[:8]) + (" and others" if len(names) > 8 else "") if names else "no fields"


# --- shapes ----------------------------------------------------------------------------------------------------------


def _pair(prompt: str, completion: str, system: str | None = None) -> Callable[[Fields], dict[str, Any]]:
    """Two fields, a question and its answer, and maybe one with a system message."""

    def convert(record: Fields) -> dict[str, Any]:
        return _asked(record[prompt], record[completion], record.get(system) if system else None)

    return convert


def _asked(prompt: Any, completion: Any, system: Any = None) -> dict[str, Any]:
    if not system:
        return {"prompt": prompt, "completion": completion}
    return {
        "prompt": [{"role": "system", "content": system}, {"role": "user", "content": prompt}],
        "completion": completion,
    }


def _with_input(context: str, answer: str) -> Callable[[Fields], dict[str, Any]]:
    """An instruction, below it a context that may be empty, and the answer."""

    def convert(record: Fields) -> dict[str, Any]:
        given = record.get(context)
        parts = [record["instruction"], *([given] if given else [])]
        if not all(isinstance(part, str) for part in parts):
            raise Dropped("wrong type", f"instruction and {context} must be strings.")
        return _asked("\n\n".join(parts), record[answer], record.get("system"))

    return convert


_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")


def _sharegpt(record: Fields) -> dict[str, Any]:
    turns = record["conversations"]
    if isinstance(turns, str):
        turns = _json(turns, "conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Dropped("wrong type", "conversations must be a list of objects with from and value.")
    messages = [_sharegpt_message(turn) for turn in turns]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return {"messages": messages, **({"tools": record["tools"]} if record.get("tools") else {})}


def _sharegpt_message(turn: Fields) -> dict[str, Any]:
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    kept = {name: turn[name] for name in ("train", "weight") if name in turn}
    if isinstance(role, str) and role in _CALLS:
        calls = _json(content, "the value of a function call") if isinstance(content, str) else content
        return {**answer_message([_call(call) for call in (calls if isinstance(calls, list) else [calls])]), **kept}
    if isinstance(role, str):
        role = _SHAREGPT_ROLES.get(role.lower(), role.lower())
    return {"role": role, "content": content, **kept}


def _xlam(record: Fields) -> dict[str, Any]:
    """Salesforce's xlam-function-calling-60k: tools and answers are JSON text, parameters have Python's types."""
    tools, answers = (
        _json(record[name], name) if isinstance(record[name], str) else record[name] for name in ("tools", "answers")
    )
    if not isinstance(tools, list) or not isinstance(answers, list):
        raise Dropped("wrong type", "tools and answers must be lists, as JSON text or not.")
    messages = [{"role": "user", "content": record["query"]}, answer_message([_call(call) for call in answers])]
    return {"messages": messages, "tools": [_xlam_tool(tool) for tool in tools]}


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise Dropped("wrong type", "A function call must be an object with name and arguments.")
    arguments = call.get("arguments", {})
    return {
        "name": call["name"],
        "arguments": _json(arguments, "arguments") if isinstance(arguments, str) else arguments,
    }


def _xlam_tool(tool: Any) -> Any:
    parameters = tool.get("parameters") if isinstance(tool, dict) else None
    if not isinstance(parameters, dict) or isinstance(parameters.get("properties"), dict):
        return tool
    if not all(isinstance(described, dict) for described in parameters.values()):
        raise Dropped("wrong type", "A tool's parameters must be objects with type and description.")
    required = [
        name
        for name, described in parameters.items()
        if "default" not in described and "optional" not in str(described.get("type", ""))
    ]
    properties = {name: {**described, **_schema_type(described.get("type"))} for name, described in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {**tool, "parameters": schema}}


_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "dict": "object",
}


def _schema_type(written: Any) -> dict[str, Any]:
    """A JSON schema's type for Python's notation, such as `List[int], optional`."""
    named = re.match(r"\w+", written.strip().lower()) if isinstance(written, str) else None
    name = named.group() if named else ""
    return {"type": _TYPES.get(name, name)} if name else {}


def _chosen(record: Fields) -> dict[str, Any]:
    """The preferred answer of a pair, and the other as `rejected`; where they are whole conversations, maybe as JSON text,
    their last messages.
    """
    chosen, rejected = (
        _conversation(x) or x if isinstance(x, str) else x for x in (record["chosen"], record["rejected"])
    )
    if not isinstance(chosen, list):
        return {"prompt": record.get("prompt"), "completion": chosen, "rejected": rejected}
    asked = chosen[:-1] or record.get("prompt")
    answer = rejected[-1:] if isinstance(rejected, list) and rejected[:-1] == chosen[:-1] else None
    return {"prompt": asked, "completion": chosen[-1:], "rejected": answer}


def _conversation(text: str) -> list[Any] | None:
    """The messages of a JSON text; None for any other text."""
    try:
        parsed = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    is_chat = isinstance(parsed, list) and all(isinstance(message, dict) and "role" in message for message in parsed)
    return parsed if is_chat else None


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Dropped("wrong type", f"{name} is a string but not valid JSON.") from None


SHAPES: dict[str, Shape] = {
    "alpaca": Shape(("instruction", "output"), _with_input("input", "output"), ("input", "system")),
    "dolly": Shape(("instruction", "response"), _with_input("context", "response"), ("context", "system")),
    "sharegpt": Shape(("conversations",), _sharegpt, ("system", "tools")),
    "xlam": Shape(("query", "tools", "answers"), _xlam),
    "metamath": Shape(("query", "response"), _pair("query", "response")),
    "openorca": Shape(("system_prompt", "question", "response"), _pair("question", "response", "system_prompt")),
    "question_answer": Shape(("question", "answer"), _pair("question", "answer")),
    "prompt_response": Shape(("prompt", "response"), _pair("prompt", "response", "system"), ("system",)),
    "input_output": Shape(("input", "output"), _pair("input", "output", "system"), ("system",)),
    "preference": Shape(("chosen", "rejected"), _chosen, ("prompt",)),
}
"""Shapes by name."""
