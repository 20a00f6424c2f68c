"""What surrounds every request: the one error shape, API keys, and the counts and log line of what was answered."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any

from aiohttp import web

from .context import CONTEXT
from .errors import error_response, json_response
from .http_metrics import HttpMetrics

logger = logging.getLogger("omni_engine.access")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Middleware = Callable[[web.Request, Handler], Coroutine[Any, Any, web.StreamResponse]]

GUARDED_PATHS = ("/v1", "/v2", "/inference", "/cohere", "/ui/live")
CLIENT_GONE_STATUS = 499  # nobody hears it; it is what proxies log for a client that did not wait


def observer(metrics: HttpMetrics, *, logs: bool, unlogged_paths: frozenset[str]) -> Middleware:
    """The outermost: counts and logs every request once it is answered, streams at their end."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.monotonic()
        status = CLIENT_GONE_STATUS
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            metrics.count(request, status, time.monotonic() - started)
            if logs and request.path not in unlogged_paths:
                _log(request, status)

    return observe


def _log(request: web.Request, status: int) -> None:
    version = request.version
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "client gone"
    # The URL is percent-encoded again, so that it cannot forge lines.
    address = f"{request.method} {request.rel_url} HTTP/{version.major}.{version.minor}"
    logger.info('%s - "%s" %d %s', request.remote or "local", address, status, phrase)


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure leaves in the one error shape."""
    try:
        return await handler(request)
    except Exception as error:
        return error_response(error)


@web.middleware
async def load_tracker(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts the POST requests in progress, for /load."""
    if request.method != "POST":
        return await handler(request)
    context = request.app[CONTEXT]
    context.load += 1
    try:
        return await handler(request)
    finally:
        context.load -= 1


def api_key_guard(keys: tuple[str, ...], root_path: str) -> Middleware:
    """Refuses (401) requests to the versioned paths that bring none of `keys` as a bearer token."""
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]
    guarded = (*GUARDED_PATHS, *(root_path + path for path in GUARDED_PATHS))

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(guarded) and request.method != "OPTIONS":
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
            # All keys are compared, in constant time: the time taken tells nothing about them.
            matches = [hmac.compare_digest(digest, known) for known in digests]
            if scheme.lower() != "bearer" or not any(matches):
                return json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return guard
