"""Random JSON Schemas over the keywords that are supported, and random answers under a grammar."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pshare_jax.sampling.params import all_allowed
from pshare_jax.text.grammar import TokenMatcher

NAMES = ("a", "b", "name", "größe", 'quote"d', "back\\slash", "x/y", "ключ", "🎈", "")
TEXTS = ("", "a", "é", "text with blanks", 'quo"te', "\\", "line\nbreak", "日本語", "👨‍👩‍👧", "true")
PATTERNS = (
    "^[a-c]{2,4}$",
    "[0-9]",
    "^(foo|bär)?$",
    "^é+x*$",
    "a.c",
    "^[^a-z]{1,3}$",
    "^\\d{3}-\\d{2}$",
    "z$",
    "^\\S+$",
)
FORMATS = ("date", "ipv4", "ipv6", "uuid", "email")


class Schemas:
    """Draws schemas; every keyword comes often enough in some hundreds."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def document(self) -> Any:
        """A whole schema, with definitions that may be recursive."""
        schema = self.schema(3)
        if isinstance(schema, dict) and self.chance(0.3):
            part = self.schema(1)
            node = {"type": "object", "properties": {"value": part, "next": {"$ref": "#/$defs/node"}}}
            schema = {"$defs": {"part": part, "node": {**node, "additionalProperties": False}}, **self.place(schema)}
        return schema

    def place(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The schema with references to the definitions."""
        name = self.pick(("part", "node"))
        kind = self.pick(("all", "property", "items"))
        if kind == "property":
            return {
                "type": "object",
                "properties": {"own": schema, "ref": {"$ref": f"#/$defs/{name}"}},
                "required": ["ref"],
            }
        if kind == "items":
            return {"type": "array", "items": {"$ref": f"#/$defs/{name}"}, "maxItems": 3, "minItems": self.small()}
        return {"$ref": f"#/$defs/{name}"}

    def schema(self, depth: int) -> Any:
        """Any schema of at most this depth."""
        makers: list[Callable[[int], Any]] = [self.string, self.number, self.integer, self.values, self.word]
        if depth:
            makers += [self.array, self.object, self.object, self.array, self.several, self.untyped, self.merged]
        schema = self.pick(makers)(depth - 1)
        if isinstance(schema, dict) and self.chance(0.2):
            schema = {"title": "T", "description": "d", "default": None, "examples": [1], "$comment": "c", **schema}
        return schema

    def word(self, depth: int) -> Any:
        return self.pick(
            ({"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}, {"type": ["integer", "boolean"]})
        )

    def string(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "string"}
        kind = self.pick(("free", "length", "length", "pattern", "pattern", "both", "format"))
        if kind in ("length", "both"):
            schema |= self.bounds("minLength", "maxLength", 6)
        if kind in ("pattern", "both"):
            schema["pattern"] = self.pick(PATTERNS)
        if kind == "format":
            schema["format"] = self.pick(FORMATS)
        return schema

    def integer(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "integer"}
        low, high = sorted(self.rng.integers(-300, 300, 2).tolist())
        self.limit(schema, low, high)
        if self.chance(0.3):
            schema["multipleOf"] = self.pick((2, 3, 7, 10))
        return schema

    def number(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "number"}
        low, high = sorted((self.rng.integers(-300, 300, 2) / self.pick((1, 2, 8))).tolist())
        self.limit(schema, low, high)
        if self.chance(0.2):
            # Exact as floats, which the validator computes with.
            schema["multipleOf"] = self.pick((0.5, 0.25, 4, 1.5))
        return schema

    def limit(self, schema: dict[str, Any], low: float, high: float) -> None:
        if self.chance(0.6):
            schema[self.pick(("minimum", "exclusiveMinimum"))] = low
        if self.chance(0.6):
            schema[self.pick(("maximum", "exclusiveMaximum"))] = high

    def values(self, depth: int) -> Any:
        if self.chance(0.5):
            return {"const": self.value(2)}
        return {"enum": [self.value(1) for _ in range(self.small() + 1)]}

    def value(self, depth: int) -> Any:
        kind = int(self.rng.integers(0, 8 if depth else 6))
        simple = (
            None,
            bool(self.rng.integers(2)),
            int(self.rng.integers(-99, 99)),
            float(self.rng.integers(-99, 99) / 4),
        )
        if kind < 4:
            return simple[kind]
        if kind < 6:
            return self.pick(TEXTS)
        parts = [self.value(depth - 1) for _ in range(self.small())]
        return parts if kind == 6 else dict(zip(self.names(len(parts)), parts, strict=True))

    def array(self, depth: int) -> Any:
        schema: dict[str, Any] = {"type": "array", **self.bounds("minItems", "maxItems", 4)}
        if self.chance(0.8):
            schema["items"] = self.schema(depth)
        if self.chance(0.3):
            schema["prefixItems"] = [self.schema(depth) for _ in range(self.small() + 1)]
        return schema

    def object(self, depth: int) -> Any:
        names = self.names(self.small() + 1)
        schema: dict[str, Any] = {"type": "object", "properties": {name: self.schema(depth) for name in names}}
        if self.chance(0.7):
            schema["required"] = [name for name in names if self.chance(0.6)] + self.names(1) * self.chance(0.1)
            schema["required"] = list(dict.fromkeys(schema["required"]))
        if self.chance(0.7):
            schema["additionalProperties"] = False if self.chance(0.6) else self.schema(depth)
        if self.chance(0.2):
            schema["patternProperties"] = {self.pick(("^p_", "^[0-9]$", "a", "^.$")): self.schema(depth)}
        if self.chance(0.2):
            schema |= self.bounds("minProperties", "maxProperties", 3)
        return schema

    def several(self, depth: int) -> Any:
        parts = [self.schema(depth) for _ in range(self.small() + 1)]
        return {self.pick(("anyOf", "anyOf", "oneOf")): parts, **({"type": "object"} if self.chance(0.1) else {})}

    def merged(self, depth: int) -> Any:
        return {"allOf": [self.pick((self.object, self.string, self.integer))(depth) for _ in range(2)]}

    def untyped(self, depth: int) -> Any:
        parts = (self.string(depth), self.integer(depth), self.array(depth), self.object(depth))
        merged = {key: value for part in parts if self.chance(0.5) for key, value in part.items() if key != "type"}
        return self.pick((merged, merged, {}, True))

    def bounds(self, least: str, most: str, limit: int) -> dict[str, int]:
        low, high = sorted(self.rng.integers(0, limit + 1, 2).tolist())
        return {least: low} if self.chance(0.2) else {most: high} if self.chance(0.2) else {least: low, most: high}

    def names(self, count: int) -> list[str]:
        return self.rng.permutation(NAMES)[:count].tolist()

    def small(self) -> int:
        return int(self.rng.integers(0, 3))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]


def random_answer(
    matcher: TokenMatcher, vocab_size: int, stop_ids: Any, likely: Any, rng: np.random.Generator, most: int
) -> tuple[list[int], bool]:
    """Ids drawn at temperature 1.5 from random logits under a grammar, and whether the answer is finished.

    `likely` tokens have higher logits, or random texts would hardly ever end.
    """
    ids: list[int] = []
    mask = all_allowed(1, vocab_size)
    while len(ids) < most:
        matcher.fill(mask[0])
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab_size].astype(bool)
        logits = rng.normal(0, 2, vocab_size)
        logits[likely] += 6
        scores = np.where(allowed, logits / 1.5, -np.inf) + rng.gumbel(size=vocab_size)
        token = int(scores.argmax())
        if token in stop_ids:
            return ids, True
        ids.append(token)
        matcher.push(token)
        if matcher.finished:
            return ids, True
    return ids, False
