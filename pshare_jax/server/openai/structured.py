"""The grammar that a body asks for: `response_format` of OpenAI's API, `guided_*` and `structured_outputs` of vLLM's."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pshare_jax.errors import PshareError
from pshare_jax.server.openai.schema import ApiError, Body, ChatBody
from pshare_jax.text.grammar import Grammar, GrammarCompiler
from pshare_jax.text.tool_format import ToolFormat
from pshare_jax.text.tool_grammar import tool_grammar

_IGNORED = ("disable_any_whitespace", "disable_fallback")
"""Options of `structured_outputs` that ask for what is always done."""


@dataclass(frozen=True)
class Constraint:
    """What a field of the body demands of the answer, as `make` turns it into a grammar."""

    field: str
    make: Callable[[Any], Grammar]
    value: Any = None

    def grammar(self) -> Grammar:
        """The grammar, not compiled yet; ApiError 400 if it cannot be made."""
        try:
            return self.make(self.value)
        except PshareError as error:
            raise refused(self.field, error) from None


def constraint_of(body: Body) -> Constraint | None:
    """The body's constraint; None if any text will do.

    Raises:
        ApiError: 400, a field has another form than its own, asks for something unsupported, or contradicts another field.
    """
    found = list(_constraints(body))
    if len(found) > 1:
        names = " and ".join(constraint.field for constraint in found[:2])
        raise ApiError(400, f"{names} both constrain the answer; send only one of them.", param=_param(found[1].field))
    return found[0] if found else None


def answer_grammar(
    body: Body, constraint: Constraint | None, form: ToolFormat | None, compiler: GrammarCompiler
) -> Grammar | None:
    """The compiled grammar of the body's answer; `form`: how it writes calls, if it may call functions.

    A forced call (`tool_choice` required or a name) leaves no room for what other fields ask for. Where calls are allowed,
    the answer is either calls or what those fields ask for.

    Raises:
        ApiError: 400, the grammar, or that of the functions, cannot be used.
    """
    rules = body.call_rules if isinstance(body, ChatBody) else None
    field, grammar = (constraint.field, constraint.grammar()) if constraint else ("", None)
    try:
        if rules is not None and form is not None:
            field = rules.field
            parallel = not rules.single
            grammar = tool_grammar(form, rules.tools, rules.choice, parallel, compiler.special_tokens, grammar)
        if grammar is not None:
            compiler.check(grammar)
    except PshareError as error:
        raise refused(field, error) from None
    return grammar


def refused(name: str, error: PshareError) -> ApiError:
    """The error for a field whose grammar cannot be used."""
    return ApiError(400, f"{name}: {error}", param=_param(name))


def _constraints(body: Body) -> Iterator[Constraint]:
    kind = body.response_format.get("type", "text")
    if kind == "json_object":
        _check_keys("response_format", body.response_format, {"type"})
        yield Constraint("response_format", _any_object)
    elif kind == "json_schema":
        schema = _format_schema(body.response_format.get("json_schema"))
        yield Constraint("response_format.json_schema.schema", _of_schema, schema)
    elif kind != "text":
        raise ApiError(400, "response_format.type must be text, json_object or json_schema.", param="response_format")
    for name, make in _KINDS.items():
        value = getattr(body, f"guided_{name}", None)
        if value is not None:
            yield Constraint(f"guided_{name}", make, value)
    outputs = {name: value for name, value in body.structured_outputs.items() if value is not None}
    _check_keys("structured_outputs", outputs, {*_KINDS, "json_object", *_IGNORED})
    for name, make in _KINDS.items():
        if name in outputs:
            yield Constraint(f"structured_outputs.{name}", make, outputs[name])
    if outputs.get("json_object"):
        yield Constraint("structured_outputs.json_object", _any_object)


def _check_keys(name: str, value: Mapping[str, Any], known: set[str]) -> None:
    if others := sorted(value.keys() - known):
        raise ApiError(400, f"{name}.{others[0]} is not supported by this server; omit it.", param=name)


def _format_schema(given: Any) -> Any:
    if not isinstance(given, Mapping) or not isinstance(given.get("schema"), Mapping | bool):
        raise ApiError(
            400,
            "response_format.json_schema must be an object with the key schema, a JSON Schema.",
            param="response_format",
        )
    return given["schema"]


def _any_object(_: Any) -> Grammar:
    return Grammar.any_object()


def _of_schema(value: Any) -> Grammar:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise PshareError("It is not JSON.") from None
    if not isinstance(value, Mapping | bool):
        raise PshareError("It must be a JSON Schema, as an object or as its JSON text.")
    return Grammar.of_schema(value)


def _of_regex(value: Any) -> Grammar:
    return Grammar.of_regex(_text(value))


def _of_text(value: Any) -> Grammar:
    return Grammar.of_text(_text(value))


def _of_choice(value: Any) -> Grammar:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise PshareError("It must be a list of texts.")
    return Grammar.of_choice(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PshareError("It must be a text.")
    return value


def _param(name: str) -> str:
    return name.partition(".")[0]


_KINDS: dict[str, Callable[[Any], Grammar]] = {
    "json": _of_schema,
    "regex": _of_regex,
    "choice": _of_choice,
    "grammar": _of_text,
}
