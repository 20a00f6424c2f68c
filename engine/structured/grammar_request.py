"""A request's constraint as it is checked before anything is compiled: sizes, depths, and what is JSON at all."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from ...scheduler.sampling_params import ValidationError, is_text
from ...scheduler.structured_outputs import StructuredOutputsParams

MAX_CHARACTERS = 1 << 19
MAX_DEPTH = 100  # of JSON; the library's own parser ends at 128, some of which its wrapping takes
MAX_CHOICES = 8192  # alternatives in all enumerations of a schema, or of `choice`
MEAN_MASK_SECONDS = 0.01  # of a CPU, that the masks of a grammar may cost
_MAPS_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


class GrammarRequest(msgspec.Struct, frozen=True):
    """What the compiling process is asked. Equal requests are one grammar. `text` is JSON for json, choice and
    structural_tag."""

    kind: str  # json | regex | choice | grammar | structural_tag
    text: str
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None


def grammar_request(params: StructuredOutputsParams) -> GrammarRequest:
    """Read a constraint; raises `ValidationError` for what is too large or no JSON, at once and without compiling."""
    kind = params.given[0]
    if kind == "json_object":
        kind, text = "json", '{"type":"object"}'
    elif kind == "choice":
        assert params.choice is not None
        if len(params.choice) > MAX_CHOICES:
            raise _refusal(f"choice may hold at most {MAX_CHOICES} texts", len(params.choice))
        if "" in params.choice:
            raise _refusal("choice must not hold an empty text", "")
        text = json.dumps(params.choice)
    else:
        text = getattr(params, kind)
    if len(text) + len(params.whitespace_pattern or "") > MAX_CHARACTERS:
        raise _refusal(f"{kind} may hold at most {MAX_CHARACTERS} characters", len(text))
    if not is_text(text) or not is_text(params.whitespace_pattern or ""):
        raise _refusal(f"{kind} is not valid Unicode, it has lone surrogates", ascii(text))
    if not text.strip():
        raise _refusal(f"{kind} must not be empty", text)
    if kind in ("json", "structural_tag"):
        tree = _parse(kind, text)
        _measure(kind, tree)
        if kind == "json" and params.disable_additional_properties:
            _close_objects(tree)
        text = json.dumps(tree, separators=(",", ":"))
    if kind not in ("json", "structural_tag"):
        return GrammarRequest(kind, text)
    return GrammarRequest(kind, text, params.disable_any_whitespace, params.whitespace_pattern)


def _parse(kind: str, text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise _refusal(f"{kind} may be nested at most {MAX_DEPTH} levels deep", "more") from None
    except ValueError as error:
        raise _refusal(f"{kind} is not valid JSON, {error}", text) from error
    if not isinstance(tree, dict):
        raise _refusal(f"{kind} must be a JSON object", text)
    return tree


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it has no number {name}")


def _measure(kind: str, tree: Any) -> None:
    """Depth and enumerations, without recursion."""
    num_choices = 0
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _refusal(f"{kind} may be nested at most {MAX_DEPTH} levels deep", "more")
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                choices = node.get("enum")
                num_choices += len(choices) if isinstance(choices, list) else 0
                below += node.values()
            else:
                below += node
        level = [node for node in below if isinstance(node, (dict, list))]
    if num_choices > MAX_CHOICES:
        raise _refusal(f"{kind} may hold at most {MAX_CHOICES} values in enumerations", num_choices)


def _close_objects(tree: dict[str, Any]) -> None:
    """Let every object of a schema have the properties it names and no others, unless it says otherwise."""
    schemas: list[Any] = [tree]
    while schemas:
        schema = schemas.pop()
        if not isinstance(schema, dict):
            continue
        is_object = schema.get("type") == "object" or "properties" in schema
        if is_object and not {"additionalProperties", "patternProperties"} & schema.keys():
            schema["additionalProperties"] = False
        for key, value in schema.items():
            if key in _MAPS_OF_SCHEMAS:
                schemas += value.values() if isinstance(value, dict) else ()
            elif key not in ("enum", "const", "default", "examples"):
                schemas += value if isinstance(value, list) else [value]


def _refusal(message: str, value: Any) -> ValidationError:
    return ValidationError(f"structured_outputs: {message}", parameter="structured_outputs", value=value)
