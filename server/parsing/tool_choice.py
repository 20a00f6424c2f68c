"""tool_choice: what it asks for, and the JSON schemas that make a model obey it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .schema_types import signature


@dataclass(frozen=True)
class ToolChoice:
    """A request's tool_choice; `name` is that of the function if it is "named"."""

    kind: Literal["none", "auto", "required", "named"]
    name: str | None = None


NO_TOOLS = ToolChoice("none")


def read_tool_choice(tool_choice: Any, tools: Sequence[Any] | None) -> ToolChoice:
    """The choice of a request: without one auto if there are tools, else none.

    `tool_choice` is "none", "auto", "required", {"type": "function", "function": {"name": …}}, or an object with
    `function.name`. Raises ValueError for anything else, for a choice without tools, and for an unknown name.
    """
    if tool_choice is None:
        return ToolChoice("auto") if tools else NO_TOOLS
    if tool_choice == "none":
        return NO_TOOLS
    if not tools:
        raise ValueError(f"tool_choice needs tools; leave it out or send tools: {tool_choice!r}")
    if tool_choice == "auto":
        return ToolChoice("auto")
    if tool_choice == "required":
        return ToolChoice("required")
    if isinstance(tool_choice, str):
        raise ValueError(f"tool_choice must be none, auto, required, or name a function: {tool_choice!r}")
    name, _ = signature(tool_choice)
    if name not in [signature(tool)[0] for tool in tools]:
        raise ValueError(f"tool_choice must name one of the functions in tools: {name!r}")
    return ToolChoice("named", name)


def tool_choice_schema(
    choice: ToolChoice, tools: Sequence[Any] | None, parallel_tool_calls: bool | None = None
) -> dict[str, Any] | None:
    """The JSON schema of an answer that obeys `choice`, None if it leaves the answer free.

    named: the function's parameters. required: a list of {"name", "parameters"}, of one element if
    `parallel_tool_calls` is False; definitions ($defs) of the tools move to the list's schema, where references look
    for them. ValueError if two tools define a name differently.
    """
    if choice.kind == "named":
        return next(
            (dict(schema) or _no_parameters() for name, schema in _signatures(tools) if name == choice.name), None
        )
    if choice.kind != "required":
        return None
    definitions: dict[str, Any] = {}
    calls = []
    for name, schema in _signatures(tools):
        own = schema.get("$defs") or {}
        if not isinstance(own, Mapping):
            raise ValueError(f"$defs in the parameters of a tool must be an object: {own!r}")
        for key, definition in own.items():
            if definitions.setdefault(key, definition) != definition:
                raise ValueError(f"two tools define a name in $defs differently: {key}")
        parameters = {key: value for key, value in schema.items() if key != "$defs"} or _no_parameters()
        properties = {"name": {"type": "string", "enum": [name]}, "parameters": parameters}
        required = ["name", "parameters"]
        calls.append({"properties": properties, "required": required, "additionalProperties": False})
    found: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "object", "anyOf": calls}}
    if parallel_tool_calls is False:
        found["maxItems"] = 1
    if definitions:
        found["$defs"] = definitions
    return found


def _signatures(tools: Sequence[Any] | None) -> list[tuple[Any, Mapping[str, Any]]]:
    return [signature(tool) for tool in tools or ()]


def _no_parameters() -> dict[str, Any]:
    return {"type": "object", "properties": {}}
