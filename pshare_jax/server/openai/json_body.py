"""A request's JSON body, from bytes to a checked body of its endpoint; bounds on what parsing may cost."""

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from pshare_jax.server.openai.schema import ApiError, RequestBody

MAX_DEPTH = 100
MAX_CONTAINERS = 1_000_000
"""Objects and lists in a body. Making five million keeps the interpreter's lock for half a second."""
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
B = TypeVar("B", bound=RequestBody)


def parse_body(kind: type[B], raw: bytes) -> B:
    """Parses and checks a JSON body.

    Raises:
        ApiError: 400, naming the field.
    """
    if _num_containers(raw) > MAX_CONTAINERS:
        raise ApiError(400, f"The request body has more than {MAX_CONTAINERS:,} objects and lists; send fewer.")
    try:
        with _no_collections():
            data = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"The request body is not valid JSON: {reason}.") from None
    if not isinstance(data, dict):
        raise ApiError(400, "The request body must be a JSON object.")
    _check_tree(data)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise invalid(error) from None


@contextmanager
def _no_collections() -> Iterator[None]:
    """Pauses the garbage collector, which would search millions of new objects again and again (1.2 s of 1.4 s for 8 MB of
    brackets) while the call keeps the interpreter's lock.
    """
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Not by a thread that found it paused: the other thread ends the pause.
        if paused:
            gc.enable()


def _num_containers(raw: bytes) -> int:
    """At most this many objects and lists are in a body; exact if there are more than `MAX_CONTAINERS`."""
    num = raw.count(b"[") + raw.count(b"{")
    if num <= MAX_CONTAINERS:
        return num
    bare = _STRING.sub(b"", raw)
    return bare.count(b"[") + bare.count(b"{")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _check_tree(data: Any) -> None:
    """Refuses lone surrogates, which cannot be encoded, and nesting deeper than templates can render."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        if not level:
            return
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                below += [*node.keys(), *node.values()]
            elif isinstance(node, list):
                below += node
            elif isinstance(node, str) and not node.isascii():
                _check_text(node)
        level = below
    raise ApiError(400, f"The request body is nested too deeply; at most {MAX_DEPTH} levels are allowed.")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "The request body contains a lone surrogate escape; send valid Unicode.") from None


def invalid(error: ValidationError) -> ApiError:
    """The error for a body that pydantic refuses."""
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "value_error":
        message: str = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        param = message.split(" ", 1)[0].split(".", 1)[0]
        return ApiError(400, message, param=param)
    name = ".".join(str(part) for part in first["loc"])
    param = str(first["loc"][0]) if first["loc"] else None
    return ApiError(400, f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}.", param=param)
