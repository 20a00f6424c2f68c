"""GET /openapi.json, made from the routes and the types of their bodies, and /docs, a page that shows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from aiohttp import web

from .. import __version__
from .chat_batch import BatchChatRequest
from .context import CONTEXT
from .docs_page import docs_page
from .errors import ErrorResponse, json_response
from .messages_api.protocol import CountTokensRequest, MessageBody, MessageErrorResponse, MessagesRequest
from .messages_api.routes import COUNT_PATH, MESSAGES_PATH
from .pooling_routes import POOLING_BODIES
from .protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .responses import (
    ChatCompletionResponse,
    CompletionResponse,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    TokenizeResponse,
)
from .responses_api.protocol import ResponseBody, ResponsesRequest
from .ui.page import CONTENT_TYPES

PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_REFERENCE = "#/components/schemas/{name}"


def _union(*bodies: tuple[tuple[Any, ...], tuple[Any, ...]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What the bodies of any of these routes may be, and their answers."""
    return tuple(kind for request, _ in bodies for kind in request), tuple(
        kind for _, answer in bodies for kind in answer
    )


# By method and path: what the request's body may be, and what the answer.
_BODIES: dict[tuple[str, str], tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    ("POST", "/v1/completions"): ((CompletionRequest,), (CompletionResponse,)),
    ("POST", "/v1/chat/completions"): ((ChatCompletionRequest,), (ChatCompletionResponse,)),
    ("POST", "/v1/chat/completions/batch"): ((BatchChatRequest,), (ChatCompletionResponse,)),
    ("POST", "/v1/responses"): ((ResponsesRequest,), (ResponseBody,)),
    ("GET", "/v1/responses/{id}"): ((), (ResponseBody,)),
    ("POST", "/v1/responses/{id}/cancel"): ((), (ResponseBody,)),
    ("POST", MESSAGES_PATH): ((MessagesRequest,), (MessageBody,)),
    ("POST", COUNT_PATH): ((CountTokensRequest,), ()),
    **{("POST", path): bodies for path, bodies in POOLING_BODIES.items()},
    ("POST", "/invocations"): _union(
        ((ChatCompletionRequest,), (ChatCompletionResponse,)),
        ((CompletionRequest,), (CompletionResponse,)),
        *(POOLING_BODIES[path] for path in ("/v1/embeddings", "/rerank", "/score")),
    ),
    ("POST", "/tokenize"): ((TokenizeRequest,), (TokenizeResponse,)),
    ("POST", "/detokenize"): ((DetokenizeRequest,), (DetokenizeResponse,)),
    ("GET", "/v1/models"): ((), (ModelList,)),
    ("GET", "/v1/models/{model}"): ((), (ModelCard,)),
}
_NO_BODIES: tuple[tuple[Any, ...], tuple[Any, ...]] = ((), ())
_NUMBER, _TEXT = {"type": "integer"}, {"type": "string"}
_QUERIES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("GET", "/v1/responses/{id}"): {"stream": {"type": "boolean"}, "starting_after": _NUMBER},
    ("GET", "/v1/responses/{id}/input_items"): {
        "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        "order": {"type": "string", "enum": ["asc", "desc"]},
        "after": _TEXT,
    },
    ("GET", "/server_info"): {"config_format": {"type": "string", "enum": ["text", "json"]}},
}
_STREAM = "text/event-stream"
# What is not JSON: the media types of the answer, none where it has no body.
_OTHER_TYPES: dict[str, tuple[str, ...]] = {
    "/metrics": ("text/plain",),
    **dict.fromkeys(("/", "/docs", "/redoc"), ("text/html",)),
    "/ui/live": (_STREAM,),
    "/ui/{name}": tuple(CONTENT_TYPES.values()),
    **dict.fromkeys(("/health", "/ping", "/start_profile", "/stop_profile"), ()),
    **dict.fromkeys(("/reset_mm_cache", "/reset_encoder_cache"), ()),
}
_STATUS = {"type": "object", "properties": {"status": _TEXT}, "required": ["status"]}  # of /health that is not well


def add_documentation_routes(app: web.Application, prefix: str) -> None:
    """The routes under `prefix`."""
    app.add_routes(
        [
            web.get(f"{prefix}/openapi.json", show_openapi),
            web.get(f"{prefix}/docs", show_docs),
            web.get(f"{prefix}/redoc", show_docs),
        ]
    )


async def show_openapi(request: web.Request) -> web.Response:
    """The description of all routes, in the OpenAPI 3.1 format."""
    return json_response(_specification(request))


async def show_docs(request: web.Request) -> web.Response:
    """All routes on one page, which loads nothing from elsewhere."""
    return web.Response(
        text=docs_page(_specification(request)),
        content_type="text/html",
        headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"},
    )


def _specification(request: web.Request) -> dict[str, Any]:
    context = request.app[CONTEXT]
    if context.openapi is None:
        context.openapi = specification(request.app, context.settings.root_path)
    return context.openapi


def specification(app: web.Application, root_path: str) -> dict[str, Any]:
    """The OpenAPI document of the routes of `app`; `root_path` is where a proxy shows them."""
    types = list(dict.fromkeys(kind for bodies in _BODIES.values() for kinds in bodies for kind in kinds))
    found, components = msgspec.json.schema_components(
        [*types, ErrorResponse, MessageErrorResponse], ref_template=_REFERENCE
    )
    schemas = list(found)  # msgspec's types say that there are none
    schema_of = dict(zip(types, schemas, strict=False))

    def schema(kinds: tuple[Any, ...]) -> dict[str, Any]:
        found = [schema_of[kind] for kind in kinds]
        return found[0] if len(found) == 1 else {"anyOf": found}

    def failure(schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": "what went wrong", "content": {"application/json": {"schema": schema}}}

    paths: dict[str, dict[str, Any]] = {}
    for method, path, handler in _routes(app, root_path):
        body, answer = _BODIES.get((method, path), _NO_BODIES)
        streams = "stream" in _QUERIES.get((method, path), ()) or any(
            "stream" in kind.__struct_fields__ for kind in body
        )
        operation: dict[str, Any] = {
            "summary": " ".join((handler.__doc__ or path).split()),
            "operationId": f"{method} {path}",
            "parameters": _parameters(method, path),
            "responses": {
                "200": {"description": "done", "content": _content(path, schema(answer) if answer else {}, streams)},
                "default": failure(schemas[-1] if path in (MESSAGES_PATH, COUNT_PATH) else schemas[-2]),
            },
        }
        if path in ("/health", "/ping"):
            operation["responses"]["503"] = failure(_STATUS)
        if body:
            content = {"application/json": {"schema": schema(body)}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "omni-engine", "version": __version__},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _routes(app: web.Application, root_path: str) -> Iterator[tuple[str, str, Any]]:
    """Method, path and handler of each route, once, however many addresses it has."""
    seen = set()
    for route in app.router.routes():
        if route.resource is None or route.method not in ("GET", "POST", "DELETE"):
            continue
        path = route.resource.canonical
        if root_path and path.startswith(root_path + "/"):
            path = path.removeprefix(root_path)
        path = path.rstrip("/") or "/"
        if (route.method, path) not in seen:
            seen.add((route.method, path))
            yield route.method, path, route.handler


def _parameters(method: str, path: str) -> list[dict[str, Any]]:
    names = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    found = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]
    for name, schema in _QUERIES.get((method, path), {}).items():
        found.append({"name": name, "in": "query", "required": False, "schema": schema})
    return found


def _content(path: str, schema: dict[str, Any], streams: bool) -> dict[str, Any]:
    """The answer's media types with their schemas; with `streams`, also server-sent events."""
    if path in _OTHER_TYPES:
        return {kind: {"schema": _TEXT} for kind in _OTHER_TYPES[path]}
    return {"application/json": {"schema": schema}} | ({_STREAM: {"schema": _TEXT}} if streams else {})
