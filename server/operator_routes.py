"""Routes for whoever runs the server: profiles, and with VLLM_SERVER_DEV_MODE=1 caches and settings."""

from __future__ import annotations

import dataclasses
import pprint
from typing import Any

from aiohttp import web

from .. import __version__
from .body import value_error
from .context import CONTEXT, ServerContext
from .errors import RequestError, json_response, not_supported


def add_profile_routes(app: web.Application, prefix: str) -> None:
    """Where --profiler-config is given."""
    app.add_routes(
        [web.post(f"{prefix}/start_profile", start_profile), web.post(f"{prefix}/stop_profile", stop_profile)]
    )


def add_development_routes(app: web.Application, prefix: str) -> None:
    """Where VLLM_SERVER_DEV_MODE is 1."""
    app.add_routes(
        [
            web.post(f"{prefix}/reset_prefix_cache", reset_prefix_cache),
            web.post(f"{prefix}/reset_mm_cache", reset_absent_cache),
            web.post(f"{prefix}/reset_encoder_cache", reset_absent_cache),
            web.get(f"{prefix}/server_info", server_info),
        ]
    )


async def start_profile(request: web.Request) -> web.Response:
    """Profile the engine's steps from now on."""
    await _profile(request, starts=True)
    return web.Response()


async def stop_profile(request: web.Request) -> web.Response:
    """Write the trace of the steps since /start_profile."""
    await _profile(request, starts=False)
    return web.Response()


async def _profile(request: web.Request, *, starts: bool) -> None:
    engine = request.app[CONTEXT].engine
    await engine.wait_ready()
    try:
        await (engine.start_profile() if starts else engine.stop_profile())
    except RuntimeError as error:
        await engine.check_health()  # a lost engine is another failure
        raise RequestError(str(error), error_type="BadRequestError") from error


async def reset_prefix_cache(request: web.Request) -> web.Response:
    """Forget all cached prefixes; success is false where running requests still hold some."""
    for name in ("reset_running_requests", "reset_external"):
        if request.query.get(name, "false").lower() not in ("false", "0"):
            raise not_supported(name)
    return json_response({"success": await request.app[CONTEXT].engine.reset_prefix_cache()})


async def reset_absent_cache(_request: web.Request) -> web.Response:
    """There is no such cache here, so it is empty."""
    return web.Response()


async def server_info(request: web.Request) -> web.Response:
    """The settings of engine and server, as text or with `config_format=json` as JSON; without the API keys."""
    form = request.query.get("config_format", "text")
    if form not in ("text", "json"):
        raise value_error("`config_format` must be text or json.", "config_format")
    context = request.app[CONTEXT]
    await context.engine.wait_ready()
    settings = _settings(context)
    return json_response({"vllm_config": settings if form == "json" else pprint.pformat(settings, width=120),
                          "version": __version__})  # fmt: skip


def _settings(context: ServerContext) -> dict[str, Any]:
    server = dataclasses.asdict(context.settings)
    server["api_keys"] = len(server["api_keys"])
    engine = {**dataclasses.asdict(context.engine.args), "max_model_len": context.engine.max_model_len}
    return {"engine": engine, "server": server}
