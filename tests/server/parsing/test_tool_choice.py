"""tool_choice and the schemas that enforce it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from omni_engine.server.parsing.tool_choice import ToolChoice, read_tool_choice, tool_choice_schema

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
PLACE = {"$defs": {"P": {"type": "object"}}, "type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "go", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.mark.parametrize(
    ("value", "tools", "choice"),
    [
        (None, TOOLS, ToolChoice("auto")), (None, None, ToolChoice("none")), (None, [], ToolChoice("none")),
        ("none", None, ToolChoice("none")), ("auto", TOOLS, ToolChoice("auto")),
        ("required", TOOLS, ToolChoice("required")),
        ({"type": "function", "function": {"name": "go"}}, TOOLS, ToolChoice("named", "go")),
    ],
)  # fmt: skip
def test_a_choice_is_read(value: Any, tools: Any, choice: ToolChoice) -> None:
    assert read_tool_choice(value, tools) == choice


@pytest.mark.parametrize(
    ("value", "tools", "message"),
    [
        ("auto", None, "needs tools"), ("required", [], "needs tools"), ("sometimes", TOOLS, "must be none, auto"),
        ({"type": "function", "function": {"name": "fly"}}, TOOLS, "must name one of the functions in tools: 'fly'"),
        ({"type": "function"}, TOOLS, "must name one"), (7, TOOLS, "must name one"),
    ],
)  # fmt: skip
def test_a_wrong_choice_says_what_to_change(value: Any, tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_tool_choice(value, tools)


def test_required_is_a_list_of_calls_with_the_definitions_at_the_top() -> None:
    tools = copy.deepcopy(TOOLS)
    schema = tool_choice_schema(ToolChoice("required"), tools)
    call = {"required": ["name", "parameters"], "additionalProperties": False}
    go = {key: value for key, value in PLACE.items() if key != "$defs"}
    assert schema == {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "anyOf": [
                {"properties": {"name": {"type": "string", "enum": ["weather"]}, "parameters": CITY}, **call},
                {"properties": {"name": {"type": "string", "enum": ["go"]}, "parameters": go}, **call},
                {
                    "properties": {
                        "name": {"type": "string", "enum": ["now"]},
                        "parameters": {"type": "object", "properties": {}},
                    },
                    **call,
                },
            ],
        },
        "$defs": PLACE["$defs"],
    }
    assert tools == TOOLS  # untouched
    assert tool_choice_schema(ToolChoice("required"), TOOLS[:1], parallel_tool_calls=False)["maxItems"] == 1


def test_named_is_the_schema_of_the_parameters() -> None:
    assert tool_choice_schema(ToolChoice("named", "go"), TOOLS) == PLACE
    assert tool_choice_schema(ToolChoice("named", "now"), TOOLS) == {"type": "object", "properties": {}}


@pytest.mark.parametrize("kind", ["auto", "none"])
def test_a_free_answer_has_no_schema(kind: Any) -> None:
    assert tool_choice_schema(ToolChoice(kind), TOOLS) is None


def test_two_definitions_of_one_name_are_refused() -> None:
    other = {"function": {"name": "stay", "parameters": {"$defs": {"P": {"type": "string"}}}}}
    with pytest.raises(ValueError, match="differently: P"):
        tool_choice_schema(ToolChoice("required"), [*TOOLS, other])
    broken = {"function": {"name": "stay", "parameters": {"$defs": [1]}}}
    with pytest.raises(ValueError, match="must be an object"):
        tool_choice_schema(ToolChoice("required"), [broken])
