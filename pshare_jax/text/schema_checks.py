"""JSON Schemas for the grammar library: parts that it would not obey are refused by name, objects are closed, and formats that
it does not know are left out.

The library itself refuses keywords that it lacks; here are those that it misreads without a word. Host code without jax.
"""

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from pshare_jax.errors import PshareError

MAX_DEPTH = 100
MAX_MULTIPLE = 10_000
"""The time to compile `multipleOf` grows with the square of its part without factors 2 and 5: minutes for 1,000,000."""
MAX_OPTIONAL = 500
"""Properties of all objects of a schema that need not be there: the time to compile an object grows with the square of theirs,
to 0.2 s for so many and 80 s for 9,000.
"""
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
_EXACT = 2**53
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_SEVERAL = ("anyOf", "allOf", "oneOf", "prefixItems")
_ONE = ("items", "additionalProperties", "additionalItems")
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_OTHER_KEYS = ("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames")


def check_schema(schema: Mapping[str, Any]) -> None:
    """Checks a schema and all schemas in it.

    Raises:
        PshareError: a keyword would not be obeyed, or the schema is nested too deeply.
    """
    multiples, num_optional = [], 0
    for node in _nodes(schema):
        _check(node)
        multiples.append(node.get("multipleOf"))
        num_optional += _num_optional(node)
    _check_multiples(multiples)
    if num_optional > MAX_OPTIONAL:
        raise PshareError(
            f"The schema has {num_optional} properties that are not required; at most {MAX_OPTIONAL} are allowed."
        )


def _nodes(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The schema and all schemas in it, level by level; PshareError where they are nested too deeply."""
    level: list[Mapping[str, Any]] = [schema]
    for _ in range(MAX_DEPTH):
        if not level:
            return
        yield from level
        level = [part for node in level for part in _parts(node)]
    raise PshareError(f"The schema is nested too deeply; at most {MAX_DEPTH} levels are allowed.")


def _parts(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    values: list[Any] = [node.get(key) for key in _ONE]
    for key in _NAMED:
        values += named.values() if isinstance(named := node.get(key), Mapping) else ()
    for key in (*_SEVERAL, "items"):
        values += several if isinstance(several := node.get(key), list) else ()
    return (value for value in values if isinstance(value, Mapping))


def _check(node: Mapping[str, Any]) -> None:
    if "x-guidance" in node:
        # It would change how the library reads the whole schema.
        raise PshareError("The schema has an unsupported keyword: x-guidance.")
    for key in ("const", "enum"):
        _check_values(key, node.get(key))
    least, required = node.get("minProperties"), node.get("required")
    most = 1 + (len(set(map(str, required))) if isinstance(required, list) else 0)
    open_keys = node.get("additionalProperties", True) is not False or "patternProperties" in node
    if isinstance(least, int | float) and least > most and open_keys:
        # A key that is not listed may be written twice, but counts once.
        raise PshareError(f"The schema has an unsupported keyword: minProperties above {most}; list the properties.")


def _num_optional(node: Mapping[str, Any]) -> int:
    listed, required = node.get("properties"), node.get("required")
    if not isinstance(listed, Mapping):
        return 0
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else ()
    return sum(name not in names for name in listed)


def _check_values(key: str, value: Any) -> None:
    """Refuses what the library would write as another value."""
    level = [value]
    while level:
        below: list[Any] = []
        for node in level:
            if isinstance(node, int | float) and abs(node) > _EXACT:
                raise PshareError(f"The schema has an unsupported {key}: numbers must be from -2**53 to 2**53.")
            if isinstance(node, str) and _CONTROL.search(node):
                raise PshareError(
                    f"The schema has an unsupported {key}: control characters other than \\b\\f\\n\\r\\t."
                )
            if isinstance(node, list):
                below += node
            elif isinstance(node, Mapping):
                below += node.values()
        level = below


def _check_multiples(values: Iterable[Any]) -> None:
    """The library builds an automaton for each, and for the least common multiple of those that apply to one value."""
    least = 1
    for value in values:
        if type(value) in (int, float) and math.isfinite(value) and value > 0:
            number = int("".join(map(str, Decimal(str(value)).as_tuple().digits)))
            for factor in (2, 5):
                while number % factor == 0:
                    number //= factor
            least = math.lcm(least, number)
            if least > MAX_MULTIPLE:
                raise PshareError(f"The schema has an unsupported keyword: multipleOf {value}; use smaller multiples.")


def with_known_formats(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without unknown values of `format` ("password", "path", ...), which by themselves forbid nothing (JSON Schema
    2020-12, Validation, 7.2.1); frameworks send them.
    """
    copied = copy.deepcopy(dict(schema))
    for node in _nodes(copied):
        if node.get("format") not in FORMATS:
            node.pop("format", None)
    return copied


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with `additionalProperties: false` in each object that lists its properties and does not say whether it has
    others, so that a small model does not invent keys; what it allows is also allowed by `schema`.

    Objects stay open where others are combined with them, since what one part lists may be a further key of the other.
    """
    return dict(schema) if _combines_references(schema) else _closed(schema)


def _closed(node: Any, alone: bool = True) -> Any:
    """`alone`: nothing else applies to the same value."""
    if not isinstance(node, Mapping):
        return node
    lists_properties = isinstance(node.get("properties"), Mapping)
    combined = [key for key in _COMBINING if key in node]
    only = alone and not lists_properties and len(combined) == 1
    made = {}
    for key, value in node.items():
        part_alone = _stays_alone(key, value, only) if key in _COMBINING else True
        if key in _NAMED and isinstance(value, Mapping):
            value = {name: _closed(part, part_alone) for name, part in value.items()}
        elif key in (*_SEVERAL, "items") and isinstance(value, list):
            value = [_closed(part, part_alone) for part in value]
        elif key in _ONE:
            value = _closed(value, part_alone)
        made[key] = value
    if alone and lists_properties and not combined and _says_nothing_else(node):
        made["additionalProperties"] = False
    return made


def _stays_alone(key: str, value: Any, only: bool) -> bool:
    # Closed parts of a oneOf may exclude each other where the parts as they were written do not.
    return only and (key == "anyOf" or (key == "allOf" and isinstance(value, list) and len(value) == 1))


def _says_nothing_else(node: Mapping[str, Any]) -> bool:
    """Whether the object's other keywords leave it satisfiable with the listed properties alone."""
    listed, required, least = node["properties"], node.get("required"), node.get("minProperties", 0)
    return (
        not any(key in node for key in _OTHER_KEYS)
        and not (isinstance(required, list) and any(name not in listed for name in required))
        and not (isinstance(least, int | float) and least > len(listed))
    )


def _combines_references(schema: Mapping[str, Any]) -> bool:
    """Whether a `$ref` stands beside other schemas of the same value anywhere: then what it names, which may be any part, must
    stay open.
    """
    level: list[tuple[Mapping[str, Any], bool]] = [(schema, True)]
    while level:
        below = []
        for node, alone in level:
            combined = [key for key in _COMBINING if key in node]
            if "$ref" in node and (not alone or "properties" in node or len(combined) > 1):
                return True
            only = alone and "properties" not in node and len(combined) == 1
            for key in ("anyOf", "oneOf", "allOf"):
                parts = node.get(key)
                if isinstance(parts, list):
                    stays = _stays_alone(key, parts, only)
                    below += [(part, stays) for part in parts if isinstance(part, Mapping)]
            combining = {id(part) for key in _COMBINING for part in _as_list(node.get(key))}
            below += [(part, True) for part in _parts(node) if id(part) not in combining]
        level = below
    return False


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
