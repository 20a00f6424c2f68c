"""The page at /docs: an OpenAPI document as HTML without scripts."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; }
code, .path { font-family: ui-monospace, monospace; }
details { border: 1px solid #8886; border-radius: 6px; margin: .5rem 0; padding: .5rem .75rem; }
summary { cursor: pointer; }
.method { display: inline-block; min-width: 4.5rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; border-top: 1px solid #8884; padding: .25rem .5rem .25rem 0; }
.scroll { overflow-x: auto; }
"""


def docs_page(specification: dict[str, Any]) -> str:
    """The page of `specification`."""
    info = specification["info"]
    title = escape(f"{info['title']} {info['version']}")
    schemas = specification["components"]["schemas"]
    operations = "\n".join(
        _operation(method, path, operation, schemas)
        for path, methods in sorted(specification["paths"].items())
        for method, operation in methods.items()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main><h1>{title}</h1>"
        '<p>All routes of this server; the same as <a href="openapi.json">openapi.json</a>.</p>'
        f"\n{operations}\n</main></body></html>\n"
    )


def _operation(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    rows = [
        _row(f"{parameter['name']} ({parameter['in']})", parameter["schema"], bool(parameter["required"]))
        for parameter in operation["parameters"]
    ]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    for struct in _structs(body or {}, schemas):
        needed = struct.get("required", ())
        rows += [_row(name, schema, name in needed) for name, schema in struct.get("properties", {}).items()]
    table = ""
    if rows:
        head = "<tr><th>field</th><th>type</th><th>default</th></tr>"
        table = f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    return (
        f'<details><summary><span class="method">{escape(method.upper())}</span> '
        f'<span class="path">{escape(path)}</span></summary><p>{escape(operation["summary"])}</p>{table}</details>'
    )


def _structs(schema: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    """The structs that a body may be."""
    return [schemas[_name(part)] for part in schema.get("anyOf", [schema]) if "$ref" in part]


def _row(name: str, schema: dict[str, Any], required: bool) -> str:
    default = "required" if required else repr(schema["default"]) if schema.get("default") is not None else ""
    cells = f"<td><code>{escape(name)}</code></td><td>{escape(_type(schema))}</td><td>{escape(default)}</td>"
    return f"<tr>{cells}</tr>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _name(schema)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(part) for part in schema["anyOf"] if part.get("type") != "null"))
    if "enum" in schema:
        return " | ".join(repr(value) for value in schema["enum"] if value is not None)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items') or {})}"
    return str(schema.get("type", "any"))


def _name(schema: dict[str, Any]) -> str:
    return schema["$ref"].rpartition("/")[2]
