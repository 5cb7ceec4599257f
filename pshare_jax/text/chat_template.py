"""Chat messages to text: checks the messages and renders the model's own Jinja template.

`Tokenizer.encode_chat` is the caller; chat_fitting.py changes the checked messages before they are rendered. The renderer
provides the environment that Hugging Face templates are written for (sandboxed, block trimming, `raise_exception`,
`strftime_now`, plain `tojson`) and gives the same text as transformers.
Messages with an unknown role or part type are refused before rendering.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from itertools import islice
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pshare_jax.errors import PshareError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_RESERVED = ("messages", "tools", "add_generation_prompt")
_METHODS = frozenset(dir(dict))
_COUNTS = frozenset(("first", "last", "index", "index0", "length"))
_MAX_ARGUMENTS = 100_000
"""Objects and lists in a call's arguments. Parsing more of them would hold up other requests."""


def checked_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages as plain dicts for a template.

    Content parts become one text, joined by newlines (as in vLLM and llama.cpp); null fields are dropped; a message's
    reasoning is stored under each name that templates use; a call's arguments become an object. Everything else stays.
    """
    if not messages:
        raise PshareError("messages is empty; send at least one message.")
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PshareError(f"Message {index} must be an object with role and content.")
    role = message.get("role")
    if role not in ROLES:
        raise PshareError(f"Message {index} has the unknown role {role!r}; use one of {', '.join(ROLES)}.")
    plain = {key: value for key, value in plain_data(message).items() if value is not None}
    if "content" in plain:
        plain["content"] = _flat_text(index, plain["content"])
    if "tool_calls" in plain:
        if not isinstance(plain["tool_calls"], list):
            raise PshareError(f"The tool_calls of message {index} must be a list of objects.")
        plain["tool_calls"] = [_with_object(index, call) for call in plain["tool_calls"]]
    if "function_call" in plain:
        plain["function_call"] = _with_object(index, plain["function_call"])
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _with_object(index: int, call: Any) -> dict[str, Any]:
    """A call whose arguments, JSON text of an object in OpenAI's API, are that object; other text stays."""
    if not isinstance(call, dict):
        raise PshareError(f"Message {index} has a tool call that is not an object.")
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object(index, call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(index, arguments)
    elif not arguments or isinstance(arguments, str):
        arguments = {}
    return {**call, "arguments": arguments}


def _parsed(index: int, arguments: str) -> Any:
    if arguments.count("{") + arguments.count("[") > _MAX_ARGUMENTS:
        raise PshareError(f"Message {index} has a call whose arguments have too many objects and lists.")
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _flat_text(index: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PshareError(
            f"The content of message {index} must be a string or a list of parts, not {type(content).__name__}."
        )
    return "\n".join(_part_text(index, part) for part in content)


def _part_text(index: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get(kind) if isinstance(part, dict) and kind in ("text", "refusal") else None
    if kind not in ("text", "refusal"):
        raise PshareError(f"Message {index} has a content part of type {kind!r}; this model supports text parts only.")
    if not isinstance(text, str):
        raise PshareError(f"Message {index} has a {kind} part whose field {kind!r} is not a string.")
    return text


def plain_data(value: Any) -> Any:
    """`value` rebuilt from dicts, lists, strings, numbers, booleans and None; any other type is a PshareError."""
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    raise PshareError(f"Messages may contain JSON values only, not {type(value).__name__}.")


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value` (plain data) with every string in it changed, keys of objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change) for item in value]
    return value


def free_characters(sent: Any, count: int) -> list[str]:
    """Characters that are not in what a client sent, for `until_mark` and for stand-ins of text.

    Raises:
        PshareError: what was sent has too many of the characters for private use.
    """
    taken = set(json.dumps(sent, ensure_ascii=False, default=str))
    free = list(islice((char for char in map(chr, range(0xE000, 0xF900)) if char not in taken), count))
    if len(free) < count:
        raise PshareError("The chat has almost all characters for private use (U+E000 to U+F8FF); leave some out.")
    return free


def until_mark(text: str, mark: str) -> str:
    """A rendering up to the mark that, with a blank, ends a message's content.

    Raises:
        PshareError: the template does not write the mark.
    """
    before, found, after = text.rpartition(mark)
    if not found:
        raise PshareError("The chat template does not show the last message's text, so it cannot be continued.")
    # A template that trims the content would have trimmed the end of the answer too.
    return before if after.startswith(" ") else before.rstrip()


class ChatTemplate:
    """One compiled chat template, which tells `clock` as the time (None: the time of the rendering)."""

    def __init__(self, source: str, clock: datetime | None = None) -> None:
        self.source = source
        self._environment = _environment(clock)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt's text; an error in the template is a PshareError with the template's own reason.

        A message without content (an assistant's tool call) is rendered without it, as in transformers; if the template
        fails on that, as Qwen3's does, with empty text.
        """
        taken = [name for name in _RESERVED if name in variables]
        if taken:
            raise PshareError(f"chat_template_kwargs may not set {', '.join(taken)}; use the request's fields instead.")
        values = {"documents": None, **variables, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._rendered({**values, "messages": messages})
        except PshareError:
            if all("content" in message for message in messages):
                raise
        return self._rendered({**values, "messages": [{"content": "", **message} for message in messages]})

    def _rendered(self, values: dict[str, Any]) -> str:
        template = self._compiled
        try:
            return template.render(values)
        except TemplateError as error:
            raise PshareError(f"The chat template refused the messages: {error.message}") from error
        except Exception as error:
            # Templates are third-party programs: an error inside one concerns these messages.
            raise PshareError(f"The chat template cannot render these messages: {error}") from error

    @cached_property
    def words(self) -> frozenset[str]:
        """Strings and field names in the template's source, which it may compare with or look up."""
        constants = {node.value for node in self._tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return frozenset(constants | {node.attr for node in self._tree.find_all(nodes.Getattr)})

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the variables that the template reads."""
        return frozenset(meta.find_undeclared_variables(self._tree))

    @cached_property
    def _tree(self) -> nodes.Template:
        try:
            return self._environment.parse(self.source)
        except TemplateError as error:
            raise _not_jinja(error) from error

    @cached_property
    def _compiled(self) -> Template:
        try:
            return self._environment.from_string(self.source)
        except TemplateError as error:
            raise _not_jinja(error) from error


def _not_jinja(error: TemplateError) -> PshareError:
    return PshareError(f"The chat template is not valid Jinja: {error.message}")


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training tools; when rendering it is only a scope."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Environment(ImmutableSandboxedEnvironment):
    def getattr(self, obj: Any, attribute: str) -> Any:
        """As in the sandbox, whose checks take half of a long chat's rendering, without them for plain data."""
        if type(obj) is dict and attribute in obj and attribute not in _METHODS:
            return obj[attribute]
        if type(obj) is LoopContext and attribute in _COUNTS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)


def _environment(clock: datetime | None) -> ImmutableSandboxedEnvironment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: (clock or datetime.now()).strftime(pattern)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
