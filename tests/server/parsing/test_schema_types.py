"""Texts become JSON values by the tool's schema."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_engine.server.parsing.schema_types import allowed_types, json_of_text, properties_by_tool

CASES = [
    ("42", "integer", "42"), ("-7", "integer", "-7"), ("+7", "integer", "7"), (" 007 ", "integer", "7"),
    ("9" * 5000, "integer", "9" * 5000), ("3.5", "integer", "3.5"), ("x", "integer", '"x"'), ("٣", "integer", '"٣"'),
    ("3.140", "number", "3.140"), ("5.0", "number", "5"), (".5", "number", "0.5"), ("1e5", "number", "1e5"),
    ("123456789012345678901.0", "number", "123456789012345678901"), ("1e999", "number", '"1e999"'),
    ("inf", "number", '"inf"'), ("nan", "number", '"nan"'), ("Infinity", "integer", '"Infinity"'), ("1_0",
    "number", '"1_0"'),
    ("True", "boolean", "true"), ("0", "boolean", "false"), ("maybe", "boolean", '"maybe"'), ("NULL", "null", "null"),
    ("None", "null", '"None"'), ('{"a": 1.10, "a": 2}', "object", '{"a": 1.10, "a": 2}'), ("[1", "array", '"[1"'),
    ("[NaN]", "array", '"[NaN]"'), ('{"x": 1e999}', "object", '"{\\"x\\": 1e999}"'), ("[" * 100_000, "array", None),
    ("[1]", "object", "[1]"), (" as it is ", "string", '" as it is "'), ("é\n\"", "string", '"é\\n\\""'), ("1",
    "interval", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "expected"), CASES)
def test_a_text_becomes_a_value_of_its_type(text: str, kind: str, expected: str | None) -> None:
    assert json_of_text(text, allowed_types({"type": kind})) == (json.dumps(text) if expected is None else expected)


@pytest.mark.parametrize(
    ("text", "kinds", "expected"),
    [
        ("null", ["string", "null"], "null"), ("null", ["string"], '"null"'), ("42", ["string", "integer"], "42"),
        ("a", ["integer", "string"], '"a"'), ("1", ["boolean", "integer"], "1"), ("true", ["string",
        "boolean"], "true"),
    ],
)  # fmt: skip
def test_of_several_types_string_comes_last(text: str, kinds: list[str], expected: str) -> None:
    assert json_of_text(text, allowed_types({"type": kinds})) == expected


@given(
    st.text(), st.sets(st.sampled_from(["null", "integer", "number", "boolean", "object", "array", "string", "odd"]))
)
def test_whatever_comes_out_is_json(text: str, kinds: set[str]) -> None:
    json.loads(json_of_text(text, frozenset(kinds)), parse_constant=lambda name: pytest.fail(name))


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_their_value(number: float) -> None:
    assert json.loads(json_of_text(repr(number), frozenset({"number"}))) == number


ROOT = {"$defs": {"A": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}, "B": {"anyOf": [{"$ref": "#/$defs/A"}]}}}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"anyOf": [{"type": "integer"}, {"oneOf": [{"type": "null"}]}]}, {"integer", "null"}),
        ({"allOf": [{"$ref": "#/$defs/B"}]}, {"object"}), ({"$ref": "#/$defs/Loop"}, {"string"}),
        ({"$ref": "https://example.com"}, {"string"}), ({"enum": [1, True, "a", None]}, {"integer", "boolean",
        "string", "null"}),
        ({"const": 1.5}, {"number"}), ({"properties": {}}, {"object"}), ({"items": {}}, {"array"}), ({}, {"string"}),
        (None, {"string"}), (True, {"string"}), ({"type": "dict"}, {"object"}), ({"type": ["int",
        "None"]}, {"integer", "None"}),
        ({"anyOf": 3, "enum": 4, "type": 5}, {"string"}),
    ],
)  # fmt: skip
def test_the_types_that_a_schema_allows(schema: Any, expected: set[str]) -> None:
    assert allowed_types(schema, ROOT) == expected


def test_schemas_that_branch_into_themselves_are_read_once() -> None:
    branches = {"anyOf": [{"$ref": "#/$defs/X"}, {"type": "integer"}] * 10}
    assert allowed_types(branches, {"$defs": {"X": branches}}) == {"integer"}


def test_a_tool_may_be_a_dict_or_an_object_nested_or_flat() -> None:
    schema = {"properties": {"a": {"type": "integer"}}}
    tools = [
        {"function": {"name": "one", "parameters": schema}},
        {"type": "function", "name": "two", "parameters": schema},
        SimpleNamespace(function=SimpleNamespace(name="three", parameters=schema)),
        SimpleNamespace(name="four", parameters=None),
        {"type": "web_search"},
    ]
    assert properties_by_tool(tools) == {
        "one": {"a": {"integer"}},
        "two": {"a": {"integer"}},
        "three": {"a": {"integer"}},
        "four": {},
    }
