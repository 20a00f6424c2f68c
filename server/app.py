"""The HTTP application: routes, and what surrounds every request (errors, API keys, request ids)."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .. import __version__
from .body import MAX_BODY_BYTES
from .chat import create_chat_completion
from .completions import create_completion
from .context import CONTEXT, ServerContext, ServerSettings, printable
from .errors import error_response, json_response
from .responses import ModelCard, ModelList

if TYPE_CHECKING:
    from ..engine.async_engine import AsyncEngine

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

Middleware = Callable[[web.Request, Handler], Coroutine[Any, Any, web.StreamResponse]]

_GUARDED_PATHS = ("/v1", "/v2", "/inference", "/cohere")


def build_app(engine: AsyncEngine, settings: ServerSettings) -> web.Application:
    """The application over `engine`, which may still be loading: requests wait until it is ready.

    Run it with `handler_cancellation=True`, so that a client that disconnects ends its request.
    """
    middlewares: list[Any] = [_errors]
    if settings.api_keys:
        middlewares.append(_api_key_guard(settings.api_keys))
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    app[CONTEXT] = ServerContext(engine, settings)
    app.add_routes(
        [
            web.get("/health", _health),
            web.get("/ping", _health),
            web.post("/ping", _health),
            web.get("/version", _version),
            web.get("/v1/models", _list_models),
            web.get("/v1/models/{model:.+}", _show_model),
            web.post("/v1/completions", create_completion),
            web.post("/v1/chat/completions", create_chat_completion),
        ]
    )
    if settings.enable_request_id_headers:
        app.on_response_prepare.append(_add_request_id)
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure leaves in the one error shape."""
    try:
        return await handler(request)
    except Exception as error:
        return error_response(error)


def _api_key_guard(keys: tuple[str, ...]) -> Middleware:
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(_GUARDED_PATHS) and request.method != "OPTIONS":
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
            # All keys are compared, in constant time: the time taken tells nothing about them.
            matches = [hmac.compare_digest(digest, known) for known in digests]
            if scheme.lower() != "bearer" or not any(matches):
                return json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return guard


async def _add_request_id(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = printable(request.headers.get("X-Request-Id", "")) or uuid.uuid4().hex


async def _health(request: web.Request) -> web.Response:
    """200 once requests are served; 503 while loading and after the engine has died."""
    engine = request.app[CONTEXT].engine
    if engine.errored:
        return json_response({"status": "dead"}, status=503)
    if not engine.is_ready:
        return json_response({"status": "loading"}, status=503)
    return web.Response()


async def _version(_request: web.Request) -> web.Response:
    return json_response({"version": __version__})


async def _list_models(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    await context.engine.wait_ready()
    return json_response(ModelList([_model_card(context, name) for name in context.model_names]))


async def _show_model(request: web.Request) -> web.Response:
    context = request.app[CONTEXT]
    name = request.match_info["model"]
    context.check_model(name)
    await context.engine.wait_ready()
    return json_response(_model_card(context, name))


def _model_card(context: ServerContext, name: str) -> ModelCard:
    permission = {
        "id": f"modelperm-{uuid.uuid4().hex}",
        "object": "model_permission",
        "created": context.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return ModelCard(name, context.created, context.settings.model, context.engine.max_model_len, [permission])
