"""Objects that list their properties are closed, and what the closed schema allows the schema itself allows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pshare_jax.text.schema_checks import closed, with_known_formats

pytestmark = pytest.mark.host
A = {"type": "object", "properties": {"a": {"type": "integer"}}}
B = {"type": "object", "properties": {"b": {"type": "integer"}}}


def shut(schema):
    return {**schema, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, shut(A)),
        ({"type": "array", "items": A}, {"type": "array", "items": shut(A)}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [shut(A), {"type": "null"}]}),
        ({"$defs": {"x": A}, "$ref": "#/$defs/x"}, {"$defs": {"x": shut(A)}, "$ref": "#/$defs/x"}),
        ({"properties": {"properties": A}}, shut({"properties": {"properties": shut(A)}})),
        ({"allOf": [A]}, {"allOf": [shut(A)]}),
    ],
)
def test_listed_properties_are_all(schema, expected):
    assert closed(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "additionalProperties": True, "properties": {}},
        {"type": "object", "additionalProperties": {"type": "integer"}, "properties": {"a": {}}},
        {"type": "object", "patternProperties": {"^x": {}}, "properties": {"a": {}}},
        {"type": "object", "required": ["z"], "properties": {"a": {}}},
        {"type": "object", "minProperties": 2, "properties": {"a": {}}},
        {"allOf": [A, B]},
        {"oneOf": [A, B]},
        {**A, "anyOf": [B, {"type": "object"}]},
        {"$defs": {"x": A, "y": B}, "allOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}]},
        {"$defs": {"x": A}, "$ref": "#/$defs/x", "properties": {"b": {}}},
        {"$defs": {"x": A}, "properties": {"a": {"allOf": [{"anyOf": [{"$ref": "#/$defs/x"}]}, B]}}, "required": ["b"]},
    ],
)
def test_objects_stay_open_where_others_join_them_or_the_schema_says_so(schema):
    assert closed(schema) == schema


def test_unknown_formats_are_annotations():
    schema = {
        "properties": {"secret": {"type": "string", "format": "password"}, "day": {"type": "string", "format": "date"}},
        "$defs": {"format": {"items": {"format": "path"}, "const": {"format": "kept"}}},
    }
    assert with_known_formats(schema) == {
        "properties": {"secret": {"type": "string"}, "day": {"type": "string", "format": "date"}},
        "$defs": {"format": {"items": {}, "const": {"format": "kept"}}},
    }
    assert schema["properties"]["secret"] == {"type": "string", "format": "password"}


def schemas():
    leaves = st.sampled_from([{"type": "integer"}, {"type": "null"}, {}, {"$ref": "#/$defs/x"}])
    keys = st.sampled_from(["a", "b"])

    def grown(parts):
        objects = st.builds(
            lambda properties, required, more: {
                "type": "object",
                "properties": properties,
                "required": required,
                **more,
            },
            st.dictionaries(keys, parts, max_size=2),
            st.lists(keys, unique=True, max_size=1),
            st.sampled_from([{}, {}, {"additionalProperties": True}, {"minProperties": 1}]),
        )
        several = st.builds(
            lambda key, values, beside: {key: values, **beside},
            st.sampled_from(["anyOf", "allOf", "oneOf"]),
            st.lists(parts, min_size=1, max_size=2),
            st.sampled_from([{}, A]),
        )
        return objects | several | parts.map(lambda part: {"type": "array", "items": part})

    whole = st.recursive(leaves, grown, max_leaves=6)
    defined = st.sampled_from([A, B, {"type": "integer"}])
    return st.builds(lambda schema, x: {**schema, "$defs": {"x": x}}, whole, defined)


def values():
    leaves = st.none() | st.integers(0, 1)
    keys = st.sampled_from(["a", "b", "c"])
    return st.recursive(leaves, lambda v: st.lists(v, max_size=2) | st.dictionaries(keys, v, max_size=2), max_leaves=5)


@settings(deadline=None, max_examples=150)
@given(schemas(), st.lists(values(), min_size=12, max_size=12))
def test_what_the_closed_schema_allows_the_schema_allows(schema, candidates):
    narrow, wide = Draft202012Validator(closed(schema)), Draft202012Validator(schema)
    for value in candidates:
        assert wide.is_valid(value) or not narrow.is_valid(value), (schema, value)
