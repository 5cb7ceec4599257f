"""YAML files and `a.b=c` overrides -> nested frozen dataclasses, with strict checks.

Serving and training call `load_settings` with their config class. Every key must be a field and every value must have
the field's type; only int becomes float. An error is one sentence with the full dotted key, and without the value if
the field's metadata say `secret`. YAML follows the core schema of YAML 1.2: `on` and `12:30` are text.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from pshare_jax.errors import PshareError

T = TypeVar("T")


def load_settings(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file, apply overrides in order and build `cls`.

    An override is `dotted.key=value` with a YAML value; it may add keys to maps (`tasks.math=base`) and index existing
    list items (`placement.decode.0.tasks=all`). In a map of plain values the rest of the key is a name, dots included.

    Raises:
        PshareError: the file cannot be read, is not a YAML mapping, repeats a key, or a key or type is wrong.
    """
    data = _read_mapping(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            # The rest may be a secret in another form.
            name = re.split(r"[:\s]", override, maxsplit=1)[0]
            raise PshareError(f"The override {name!r} must have the form key=value, such as server.port=8001.")
        value = text if _is_secret(cls, key.split(".")) else _parse(text, f"the value of the override {key}")
        data = _assign(cls, data, key.split("."), value, "")
    return _build(cls, data, "")


def with_values(settings: T, values: Mapping[str, Any]) -> T:
    """The settings with other values at dotted keys.

    Raises:
        PshareError: a key or type is wrong.
    """
    data = _plain(settings)
    for key, value in values.items():
        data = _assign(type(settings), data, key.split("."), value, "")
    return _build(type(settings), data, "")


def check_least(values: Iterable[tuple[str, int | None, int]]) -> None:
    """Check numbers given as (key, value, minimum); None is accepted.

    Raises:
        PshareError: naming the key.
    """
    for key, value, minimum in values:
        if value is not None and value < minimum:
            raise PshareError(f"{key} must be at least {minimum}, not {value}.")


def to_yaml(settings: Any) -> str:
    """The settings as YAML, from which `load_settings` builds an equal object."""
    return yaml.dump(_plain(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core types (`1e-4` is a number, `no` is text), without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would read as another type."""


_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        # An alias or a tag may be the start of an unquoted secret.
        problem = re.sub(r" (alias|tag) '.*'", r" \1", str(error.problem or error.context))
        raise PshareError(f"Cannot read {where} as YAML: {line}{problem}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PshareError(f"Cannot read {where} as YAML: {str(error).splitlines()[0]}.") from None


def _read_mapping(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PshareError(f"There is no config file {path}.") from None
    except UnicodeDecodeError:
        raise PshareError(f"The config file {path} is not UTF-8 text.") from None
    except OSError as error:
        raise PshareError(f"Cannot read the config file {path}: {error.strerror}.") from None
    data = _parse(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise PshareError(f"The config file {path} must contain `key: value` lines, not {_named(data)}.")
    return data


# --- overrides -------------------------------------------------------------------------------------------------------


def _assign(kind: Any, node: Any, parts: list[str], value: Any, key: str) -> Any:
    """`node` with `value` at the path `parts`; `kind` is the declared type, `key` the dotted name so far."""
    if not parts:
        return value
    kind = _container(kind)
    if kind is None:
        raise PshareError(f"{key} is a plain value and has no key {parts[0]!r} below it.")
    if dataclasses.is_dataclass(kind):
        fields = _field_types(kind)
        if parts[0] not in fields:
            raise _unknown_key(kind, key, parts[0])
        node = _as_map(node, key)
        below = _assign(fields[parts[0]], node.get(parts[0]), parts[1:], value, _join(key, parts[0]))
        return {**node, parts[0]: below}
    if typing.get_origin(kind) is dict:
        node, inner = _as_map(node, key), typing.get_args(kind)[1]
        name, rest = _map_key(inner, parts)
        return {**node, name: _assign(inner, node.get(name), rest, value, _join(key, name))}
    return _assign_item(kind, node, parts, value, key)


def _map_key(inner: Any, parts: list[str]) -> tuple[str, list[str]]:
    """The name in a map whose values have the type `inner`, and the rest of a dotted key. Names of plain values may have
    dots; where a value may be plain or a map, the name ends before the first key of the map.
    """
    below = _container(inner)
    if below is None:
        return ".".join(parts), []
    if typing.get_origin(inner) not in (Union, types.UnionType) or not dataclasses.is_dataclass(below):
        return parts[0], parts[1:]
    keys = _field_types(below)
    end = next((index for index in range(1, len(parts)) if parts[index] in keys), len(parts))
    return ".".join(parts[:end]), parts[end:]


def _assign_item(kind: Any, node: Any, parts: list[str], value: Any, key: str) -> list:
    items = list(node) if isinstance(node, list) else []
    if not parts[0].isdecimal() or int(parts[0]) >= len(items):
        raise PshareError(f"{key} has {len(items)} items (counted from 0), so {_join(key, parts[0])} does not exist.")
    index = int(parts[0])
    items[index] = _assign(typing.get_args(kind)[0], items[index], parts[1:], value, _join(key, parts[0]))
    return items


def _as_map(node: Any, key: str) -> dict:
    if node is None:
        return {}
    if not isinstance(node, dict):
        raise PshareError(f"{key} must be a map of keys and values, not {_named(node)}.")
    return node


# --- building --------------------------------------------------------------------------------------------------------


def _build(kind: Any, value: Any, key: str) -> Any:
    """Check `value` against the declared type `kind`; maps become dataclasses, lists become lists or tuples."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key)
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return _build_union(kind, value, key)
    if origin is dict and isinstance(value, dict):
        inner = typing.get_args(kind)[1]
        return {_text_key(name, key): _build(inner, item, _join(key, name)) for name, item in value.items()}
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_build(typing.get_args(kind)[0], item, _join(key, i)) for i, item in enumerate(value))
    if not _is_plain(kind, value):
        raise PshareError(f"{key} must be {_described(kind)}, not {_named(value)}.")
    return float(value) if kind is float else value


def _build_dataclass(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise PshareError(f"{key} must be a map of keys and values, not {_named(value)}.")
    types_of = _field_types(kind)
    for name in value:
        if name not in types_of:
            raise _unknown_key(kind, key, name)
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in value:
            raise PshareError(f"The key {_join(key, field.name)} is missing; it is {_described(types_of[field.name])}.")
    secrets = {field.name for field in dataclasses.fields(kind) if field.metadata.get("secret")}
    return kind(
        **{name: _build_field(types_of[name], item, _join(key, name), name in secrets) for name, item in value.items()}
    )


def _is_secret(cls: Any, names: Sequence[str]) -> bool:
    """Whether the key is a secret, whose override is used verbatim: YAML could truncate it or read it as null."""
    for name in names[:-1]:
        kind = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
        cls = next((member for member in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(member)), None)
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return any(field.name == names[-1] and field.metadata.get("secret") for field in fields)


def _build_field(kind: Any, value: Any, key: str, secret: bool) -> Any:
    try:
        return _build(kind, value, key)
    except PshareError:
        if not secret:
            raise
        # The value may be the secret itself, and errors are logged.
        raise PshareError(f"{key} must be {_described(kind)}; put a number or a word like true in quotes.") from None


def _build_union(kind: Any, value: Any, key: str) -> Any:
    members = typing.get_args(kind)
    exact = sorted((m for m in members if _is_plain(m, value)), key=lambda m: m is float)
    if exact:
        return _build(exact[0], value, key)
    for member in members:
        fits = list if typing.get_origin(member) in (list, tuple) else dict
        if _container(member) is not None and isinstance(value, fits):
            return _build(member, value, key)
    raise PshareError(f"{key} must be {_described(kind)}, not {_named(value)}.")


def _is_plain(kind: Any, value: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(kind))
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return type(value) in (int, float)
    return kind in (str, int, bool) and type(value) is kind


def _container(kind: Any) -> Any:
    """The dataclass, dict, list or tuple type inside `kind` (also inside a union), or None for plain values."""
    if dataclasses.is_dataclass(kind) or typing.get_origin(kind) in (dict, list, tuple):
        return kind
    if typing.get_origin(kind) in (Union, types.UnionType):
        return next((m for m in typing.get_args(kind) if _container(m) is not None), None)
    return None


def _field_types(kind: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _text_key(name: Any, key: str) -> str:
    if not isinstance(name, str):
        raise PshareError(f'The name {name} in {key} must be text; put it in quotes: "{name}".')
    return name


# --- wording ---------------------------------------------------------------------------------------------------------


def _unknown_key(kind: Any, parent: str, name: Any) -> PshareError:
    """A config class may say in `MOVED` what has become of a former key."""
    moved = getattr(kind, "MOVED", {}).get(name)
    allowed = f"{parent or 'the config'} takes {', '.join(_field_types(kind))}" if moved is None else moved
    return PshareError(f"Unknown key {_join(parent, name)}; {allowed}.")


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _named(value: Any) -> str:
    """A value as an error names it."""
    if value is None:
        return "empty"
    if isinstance(value, dict | list):
        return "a map" if isinstance(value, dict) else "a list"
    if isinstance(value, bool):
        return str(value).lower()
    return f"the text {value!r}" if isinstance(value, str) else f"the number {value}"


def _described(kind: Any) -> str:
    """A type as an error names it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(member) for member in args)
    if origin in (list, tuple):
        return f"a list of {_described(args[0])}"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "a map"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "empty"}
    return names.get(kind, str(kind))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
