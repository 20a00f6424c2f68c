"""Values of formats without types, turned into JSON by the tool's JSON schema.

A tool is a dict as the API has it, {"type": "function", "function": {"name", "parameters"}} or flat as in the Responses
API, or an object with attributes of these names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

JSON_TYPE_OF_NAME = {
    "string": "string", "str": "string", "text": "string", "varchar": "string", "char": "string", "enum": "string",
    "integer": "integer", "int": "integer", "long": "integer", "short": "integer", "uint": "integer",
    "int32": "integer", "int64": "integer", "uint32": "integer", "uint64": "integer", "unsigned": "integer",
    "number": "number", "float": "number", "double": "number", "num": "number", "decimal": "number",
    "boolean": "boolean", "bool": "boolean", "binary": "boolean",
    "object": "object", "dict": "object", "map": "object",
    "array": "array", "list": "array", "arr": "array", "tuple": "array",
    "null": "null",
}  # fmt: skip
_PYTHON_TYPES = (
    (bool, "boolean"),
    (int, "integer"),
    (float, "number"),
    (str, "string"),
    (list, "array"),
    (dict, "object"),
)
_ORDER = ("null", "integer", "number", "boolean", "object", "array")  # tried before string and in this order
_INTEGER = re.compile(r"(?P<sign>[+-]?)(?P<digits>[0-9]+)", re.ASCII)
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>[0-9]*)(?:\.(?P<fraction>[0-9]*))?(?P<exponent>[eE][+-]?[0-9]+)?", re.ASCII
)
_MAX_DEPTH = 64
STRING = frozenset({"string"})


def properties_by_tool(tools: Sequence[Any] | None) -> dict[str, dict[str, frozenset[str]]]:
    """For every tool, the JSON types that its schema allows for each of its parameters."""
    found = {}
    for tool in tools if isinstance(tools, (list, tuple)) else ():
        name, schema = signature(tool)
        if isinstance(name, str):
            properties = schema.get("properties")
            properties = properties if isinstance(properties, Mapping) else {}
            found[name] = {str(key): allowed_types(value, schema) for key, value in properties.items()}
    return found


def signature(tool: Any) -> tuple[Any, Mapping[str, Any]]:
    """Name and parameter schema of a tool; an empty schema where it has none."""
    function = _part(tool, "function")
    owner = tool if function is None else function
    schema = _part(owner, "parameters")
    return _part(owner, "name"), schema if isinstance(schema, Mapping) else {}


def _part(owner: Any, name: str) -> Any:
    return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)


def allowed_types(schema: Any, root: Mapping[str, Any] | None = None) -> frozenset[str]:
    """The names of the JSON types that `schema` allows, unknown names as they are; string where it says nothing.

    References are followed inside `root`, the schema that `schema` is a part of.
    """
    return _types(schema, root or {}, set(), _MAX_DEPTH) or STRING


def _types(schema: Any, root: Mapping[str, Any], followed: set[str], depth: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or not depth:
        return frozenset()
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in followed:
            return frozenset()
        followed.add(reference)
        return _types(_referenced(reference, root), root, followed, depth - 1)
    stated = schema.get("type")
    if isinstance(stated, str):
        return frozenset({_json_type(stated)})
    if isinstance(stated, (list, tuple)):
        return frozenset(_json_type(name) for name in stated if isinstance(name, str))
    found: set[str] = set()
    for key in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(key)
        for part in parts if isinstance(parts, (list, tuple)) else ():
            found |= _types(part, root, followed, depth - 1)
    values = schema.get("enum")
    found.update(_type_of_value(value) for value in (values if isinstance(values, (list, tuple)) else ()))
    if "const" in schema:
        found.add(_type_of_value(schema["const"]))
    if not found:
        found.update(kind for key, kind in (("properties", "object"), ("items", "array")) if key in schema)
    return frozenset(found)


def _json_type(name: str) -> str:
    return JSON_TYPE_OF_NAME.get(name.strip().lower(), name)


def _type_of_value(value: Any) -> str:
    return next((name for kind, name in _PYTHON_TYPES if isinstance(value, kind)), "null")


def _referenced(reference: str, root: Mapping[str, Any]) -> Any:
    found: Any = root
    for part in reference.removeprefix("#/").split("/") if reference.startswith("#/") else [""]:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def json_of_text(text: str, types: frozenset[str]) -> str:
    """`text` as the JSON text of the first allowed type that it is a value of; a string if it is of none.

    Numbers keep their digits, but a number without a fraction is written as an integer (5.0 as 5).
    """
    value = text.strip()
    for kind in _ORDER:
        if kind in types:
            found = _READERS[kind](value)
            if found is not None:
                return found
    if "string" in types:
        return json_string(text)
    return valid_json(value) or json_string(text)


def json_string(text: str) -> str:
    """`text` as a JSON string; characters beyond ASCII stay as they are."""
    return json.dumps(text, ensure_ascii=False)


def valid_json(text: str) -> str | None:
    """`text` if it is JSON without numbers that are not finite, else None."""
    return text if _parsed(text) is not _INVALID else None


_INVALID = object()


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_digits)
    except (ValueError, RecursionError):
        return _INVALID


def _refuse(text: str) -> Any:
    raise ValueError(f"not a JSON value: {text}")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"not a finite number: {text}")
    return number


def _digits(text: str) -> int:
    return 0 if len(text) > 64 else int(text)  # the value is not used, and long ones are slow to read


def _null(text: str) -> str | None:
    return "null" if text.lower() == "null" else None


def _integer(text: str) -> str | None:
    found = _INTEGER.fullmatch(text)
    if found is None:
        return None
    digits = found["digits"].lstrip("0") or "0"
    return f"-{digits}" if found["sign"] == "-" and digits != "0" else digits


def _number(text: str) -> str | None:
    found = _NUMBER.fullmatch(text)
    if found is None or not (found["whole"] or found["fraction"]) or not math.isfinite(float(text)):
        return None
    whole = found["whole"].lstrip("0") or "0"
    fraction = found["fraction"] or ""
    exponent = found["exponent"] or ""
    if not fraction.strip("0") and not exponent:
        return _integer(found["sign"] + whole)
    sign = "-" if found["sign"] == "-" else ""
    return sign + whole + (f".{fraction}" if fraction else "") + exponent


def _boolean(text: str) -> str | None:
    return {"true": "true", "1": "true", "false": "false", "0": "false"}.get(text.lower())


def _object(text: str) -> str | None:
    return text if isinstance(_parsed(text), dict) else None


def _array(text: str) -> str | None:
    return text if isinstance(_parsed(text), list) else None


_READERS = {
    "null": _null,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _object,
    "array": _array,
}
