"""The HTTP application: its routes and what surrounds them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .. import __version__
from .body import MAX_BODY_BYTES
from .chat import create_chat_completion
from .chat_batch import create_chat_batch
from .completions import create_completion
from .context import CONTEXT, ServerContext, printable
from .cors import install, preflight
from .errors import json_response
from .http_metrics import HttpMetrics
from .invocations import invoke
from .load_report import add_load_report
from .messages_api.routes import add_message_routes
from .middleware import api_key_guard, errors, load_tracker, observer, traced, vllm_api_key_guard
from .openapi import add_documentation_routes
from .operator_routes import add_development_routes, add_profile_routes
from .pooling_routes import add_pooling_routes
from .responses import ModelCard, ModelList
from .responses_api.routes import add_response_routes
from .settings import ServerSettings
from .tokenization import detokenize, tokenize, tokenizer_info
from .ui.page import add_page

if TYPE_CHECKING:
    from ..engine.async_engine import AsyncEngine


def build_app(engine: AsyncEngine, settings: ServerSettings) -> web.Application:
    """The application over `engine`, which may still be loading: requests wait until it is ready.

    Run it with `handler_cancellation=True`, so that a client that disconnects ends its request.
    """
    metrics = HttpMetrics(engine.metrics_registry)
    unlogged = frozenset(settings.unlogged_paths)
    middlewares: list[Any] = [observer(metrics, logs=settings.access_log, unlogged_paths=unlogged), errors]
    if settings.cors.origins:
        middlewares.append(preflight(settings.cors))
    if settings.api_keys:
        new_guard = vllm_api_key_guard if settings.guards_as_vllm else api_key_guard
        middlewares.append(new_guard(settings.api_keys, settings.root_path))
    if engine.tracer is not None:
        middlewares.append(traced(engine.tracer))
    if settings.enable_server_load_tracking:
        middlewares.append(load_tracker)
    app = web.Application(middlewares=middlewares, client_max_size=MAX_BODY_BYTES)
    app[CONTEXT] = ServerContext(engine, settings)
    # A proxy may pass the root path on or strip it.
    prefixes = tuple(dict.fromkeys(("", settings.root_path)))
    for prefix in prefixes:
        app.add_routes(
            [
                web.get(f"{prefix}/health", _health),
                web.get(f"{prefix}/ping", _health),
                web.post(f"{prefix}/ping", _health),
                web.get(f"{prefix}/version", _version),
                web.get(f"{prefix}/load", _load),
                web.get(f"{prefix}/metrics", metrics.show),
                web.get(f"{prefix}/metrics/", metrics.show),
                web.get(f"{prefix}/v1/models", _list_models),
                web.get(f"{prefix}/v1/models/{{model:.+}}", _show_model),
                web.post(f"{prefix}/v1/completions", create_completion),
                web.post(f"{prefix}/v1/chat/completions", create_chat_completion),
                web.post(f"{prefix}/v1/chat/completions/batch", create_chat_batch),
                web.post(f"{prefix}/invocations", invoke),
                web.post(f"{prefix}/tokenize", tokenize),
                web.post(f"{prefix}/detokenize", detokenize),
            ]
        )
        add_response_routes(app, prefix)
        add_message_routes(app, prefix)
        add_pooling_routes(app, prefix)
        if settings.enable_tokenizer_info:
            app.add_routes([web.get(f"{prefix}/tokenizer_info", tokenizer_info)])
        if settings.enable_profile:
            add_profile_routes(app, prefix)
        if settings.enable_development:
            add_development_routes(app, prefix)
        if settings.enable_docs:
            add_documentation_routes(app, prefix)
    if settings.ui:
        add_page(app, prefixes)
    if settings.cors.origins:
        install(settings.cors, app)
    app.on_response_prepare.append(add_load_report)
    if settings.enable_request_id_headers:
        app.on_response_prepare.append(_add_request_id)
    return app


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


async def _load(request: web.Request) -> web.Response:
    """Requests in progress; always 0 without --enable-server-load-tracking."""
    return json_response({"server_load": request.app[CONTEXT].load})


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
