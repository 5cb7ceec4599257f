"""The grammar of an answer with function calls, made from the format that rendering and parsing use. Host code without jax."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.text.grammar import JSON_FORM, Grammar, lark_string, schema_text
from pshare_jax.text.tool_format import ToolFormat

_COMMA, _COLON = (f"/{JSON_FORM[name]}/" for name in ("item_separator", "key_separator"))


def tool_grammar(
    form: ToolFormat,
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    parallel: bool,
    special: Mapping[str, int] | None = None,
    otherwise: Grammar | None = None,
) -> Grammar | None:
    """What an answer with OpenAI's `tools` may be; None if nothing is constrained (`auto` without a strict tool).

    `choice` is `auto`, `required` or a function's name. `required` is one or more calls, one at most without `parallel`; a
    name is one call of this function. With `auto` the answer is free text until the model begins a call with the format's
    start (without one: with the body's first bracket); then it must be a call of one of the tools, and the arguments follow
    the schemas of those that are strict, else they are any object. With `auto` and `otherwise` the answer is either calls
    alone or what `otherwise` allows. `special` gives the ids of control tokens by their text
    (`GrammarCompiler.special_tokens`): where a marker has one, the model must write the token.

    Raises:
        PshareError: parameters have a keyword that cannot be obeyed, or are not those of an object; or `choice` is unknown.
    """
    functions = [tool["function"] for tool in tools]
    auto = choice == "auto"
    if auto and otherwise is None and not any(function.get("strict") for function in functions):
        return None
    if choice not in ("auto", "required"):
        functions = [function for function in functions if function["name"] == choice][:1]
        parallel = False
    if not functions:
        raise PshareError(f"There is no function {choice!r} among the tools to be called.")
    call = " | ".join(_call(form, function, obeyed=not auto or bool(function.get("strict"))) for function in functions)
    shape, rules = _Shape(form, special or {}), [f"call: {call}"]
    if auto and otherwise is not None:
        rules += ["start: calls | @answer", *shape.calls(parallel)]
        return Grammar.of_lark("\n".join(rules)).with_part("answer", otherwise)
    rules += shape.auto(parallel) if auto else ["start: calls", *shape.calls(parallel)]
    return Grammar.of_lark("\n".join(rules))


class _Shape:
    """The rules around `call`, one call's JSON object."""

    def __init__(self, form: ToolFormat, special: Mapping[str, int]):
        self._form = form
        self._start, self._end = (_pieces(marker, special) for marker in (form.start.lstrip(), form.end.rstrip()))

    def calls(self, parallel: bool) -> list[str]:
        """The rule `calls`: one call, or with `parallel` several."""
        if self._form.body == "list":
            return [f"calls: {' '.join([*self._start, 'body', *self._end])}", self._list(parallel)]
        separator = '"\\n"?' if self._start else '("; " | "\\n")'
        more = f"({separator} marked)*" if parallel else ""
        return [f"calls: marked {more}", f"marked: {' '.join([*self._start, 'call', *self._end])}"]

    def auto(self, parallel: bool) -> list[str]:
        """Text, and calls where the model begins them."""
        is_list = self._form.body == "list"
        rules = [self._list(parallel)] if is_list else []
        inner = "body" if is_list else "call"
        if not self._start:
            more = '(("; " | "\\n") call)*' if parallel and not is_list else ""
            bracket = "\\[" if is_list else "{"
            rules += [f"start: TEXT? | {inner} {more}", f"TEXT: /\\s*[^\\s{bracket}](?s:.)*/"]
            return rules
        begin, *rest = self._start
        marked = " ".join([*rest, inner, *self._end])
        if begin.startswith("<["):
            before, rules = f"TEXT {begin}", [*rules, "TEXT: /(?s:.)*/"]
        else:
            # What the model may leave out behind the marker belongs to the format, but does not begin a call.
            marker, blanks = _split_blanks(json.loads(begin))
            rules += [f"before[lazy]: TEXT {lark_string(marker)}", "TEXT: /(?s:.)*/"]
            before, marked = "before", " ".join([*([lark_string(blanks)] if blanks else []), marked])
        several = parallel and not is_list
        rules += [f"start: ({before} {marked})* TEXT" if several else f"start: TEXT | {before} {marked}"]
        return rules

    def _list(self, parallel: bool) -> str:
        more = f"({_COMMA} call)*" if parallel else ""
        return f'body: "[" call {more} "]"'


def _call(form: ToolFormat, function: Mapping[str, Any], obeyed: bool) -> str:
    """A call's JSON object: its name and its arguments, in this order."""
    parameters = function.get("parameters") if obeyed else None
    schema = {"type": "object", **(parameters or {})}
    if schema["type"] != "object":
        raise PshareError(f"The parameters of the function {function['name']!r} must have the type object.")
    try:
        arguments = schema_text(schema)
    except PshareError as error:
        raise PshareError(f"The parameters of the function {function['name']!r} cannot be used. {error}") from None
    name, key = (lark_string(json.dumps(text, ensure_ascii=False)) for text in (function["name"], form.arguments_key))
    # The lexemes of `%json`, so that a call and other JSON may begin alike.
    return f'"{{" "\\"name\\"" {_COLON} {name} {_COMMA} {key} {_COLON} %json {arguments} "}}"'


def _pieces(marker: str, special: Mapping[str, int]) -> list[str]:
    """A marker as literals, and as ids where it has control tokens."""
    if not marker:
        return []
    found = sorted((text for text in special if text and text in marker), key=len, reverse=True)
    if not found:
        return [lark_string(marker)]
    parts = re.split(f"({'|'.join(map(re.escape, found))})", marker)
    return [f"<[{special[part]}]>" if part in special else lark_string(part) for part in parts if part]


def _split_blanks(marker: str) -> tuple[str, str]:
    return marker.rstrip(), marker[len(marker.rstrip()) :]
