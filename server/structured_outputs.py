"""What requests ask of the form of an answer, in both APIs' spellings, as `StructuredOutputsParams`."""

from __future__ import annotations

from typing import Any

from ..scheduler.structured_outputs import CONSTRAINTS, StructuredOutputsParams
from .body import value_error
from .errors import not_supported
from .parsing.tool_choice import ToolChoice, tool_choice_schema
from .parsing.tool_parser import ToolParser
from .protocol import ChatCompletionRequest, GenerationRequest

_FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def read_constraint(request: GenerationRequest) -> StructuredOutputsParams | None:
    """The constraint of `structured_outputs` and `response_format`, which may complete each other; raises
    `RequestError` (400)."""
    fields = dict(request.structured_outputs or {})
    unknown = set(fields) - set(StructuredOutputsParams.__struct_fields__)
    if unknown:
        raise value_error(f"`structured_outputs` has no field {', '.join(sorted(unknown))}.", "structured_outputs")
    by_format = _of_response_format(request.response_format)
    fields |= by_format
    if not any(value is not None and value is not False for value in fields.values()):
        return None
    try:
        return StructuredOutputsParams(**{name: value for name, value in fields.items() if value is not None})
    except ValueError as error:
        raise value_error(str(error), "response_format" if by_format else "structured_outputs") from error


def _of_response_format(response_format: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of `StructuredOutputsParams` for a response_format."""
    if response_format is None:
        return {}
    kind = response_format.get("type")
    if kind not in _FORMATS:
        raise value_error(
            f"`response_format` must have a type, one of {', '.join(_FORMATS)}: {kind!r:.100}", "response_format"
        )
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        wrapped = response_format.get("json_schema")
        schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
        if not isinstance(schema, dict):
            raise value_error(
                "When response_format type is 'json_schema', the 'json_schema' field must hold a schema, an object.",
                "response_format",
            )
        return {"json": schema}
    if kind == "structural_tag":
        return {"structural_tag": response_format}
    return {}


def constrain_to_calls(
    request: ChatCompletionRequest, choice: ToolChoice, tool_parser: type[ToolParser] | None
) -> None:
    """Have the answer to a request obey its tool_choice, which goes before its other constraints; how JSON is written
    stays as it asks. Raises `RequestError` (400) where the tools cannot be written as one schema, or the parser knows
    no JSON."""
    if choice.kind not in ("required", "named"):
        return
    if tool_parser is not None and not tool_parser.supports_required_and_named:
        raise not_supported(
            "tool_choice",
            f'"{choice.kind}" tool choice is not supported with this server\'s tool parser, whose answers are not '
            'JSON: set tool_choice to "auto" or "none"',
        )
    try:
        schema = tool_choice_schema(choice, request.tools, request.parallel_tool_calls)
    except ValueError as error:
        raise value_error(str(error), "tools") from error
    options = {name: value for name, value in (request.structured_outputs or {}).items() if name not in CONSTRAINTS}
    request.structured_outputs = {**options, "json": schema}
    request.response_format = None
