"""JSON of large answers without long calls: Python's C encoder keeps the interpreter's lock for as long as one call takes."""

import json
from collections.abc import Iterator
from typing import Any

from fastapi.responses import JSONResponse

PART = 256
"""Items of a list that are encoded in one call."""


def dump(value: Any) -> bytes:
    """`value` as compact JSON in UTF-8, written in parts between which other threads run."""
    return "".join(_parts(value)).encode()


def _parts(value: Any, in_list: bool = False) -> Iterator[str]:
    if isinstance(value, dict):
        separator = "{"
        for key, item in value.items():
            yield f"{separator}{_short(key)}:"
            yield from _parts(item, in_list)
            separator = ","
        yield "}" if value else "{}"
    elif not isinstance(value, list):
        yield _short(value)
    elif not in_list and value and isinstance(value[0], dict):
        # The choices of a call: few, and each may be large.
        separator = "["
        for item in value:
            yield separator
            yield from _parts(item, in_list=True)
            separator = ","
        yield "]"
    else:
        slices = (_short(value[start : start + PART])[1:-1] for start in range(0, len(value), PART))
        separator = "["
        for part in slices:
            yield f"{separator}{part}"
            separator = ","
        yield "]" if value else "[]"


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class LargeJSONResponse(JSONResponse):
    """A JSON response that may be large; make it in a thread."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return dump(content)
