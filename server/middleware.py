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

from ..engine.tracing import RequestTracer
from .context import CONTEXT
from .errors import RequestError, error_headers, error_info, error_response, json_response
from .http_metrics import HttpMetrics
from .messages_api.protocol import error_body
from .messages_api.routes import COUNT_PATH, MESSAGES_PATH

logger = logging.getLogger("omni_engine.access")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Middleware = Callable[[web.Request, Handler], Coroutine[Any, Any, web.StreamResponse]]

VLLM_GUARDED_PATHS = ("/v1", "/v2", "/inference", "/cohere", "/ui/live")
OPEN_PATHS = ("/health", "/ping")
CLIENT_GONE_STATUS = 499  # nobody hears it; it is what proxies log for a client that did not wait


def observer(metrics: HttpMetrics, *, logs: bool, unlogged_paths: frozenset[str]) -> Middleware:
    """The outermost: counts and logs every request once it is answered, streams at their end."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.monotonic()
        status, num_bytes = CLIENT_GONE_STATUS, 0
        try:
            response = await handler(request)
            # a stream has been sent by now, anything else is yet to be
            status, num_bytes = response.status, response.content_length or response.body_length
            return response
        finally:
            metrics.count(request, status, time.monotonic() - started, num_bytes)
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
    """Every failure leaves in the one error shape, or in Anthropic's for its API."""
    try:
        return await handler(request)
    except Exception as error:
        if request.path.endswith((MESSAGES_PATH, COUNT_PATH)):
            info = error_info(error)
            return json_response(error_body(info), status=info.code, headers=error_headers(error))
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


def traced(tracer: RequestTracer) -> Middleware:
    """Spans of requests belong to the span that the headers name."""

    @web.middleware
    async def trace(request: web.Request, handler: Handler) -> web.StreamResponse:
        with tracer.caller(request.headers):
            return await handler(request)

    return trace


def api_key_guard(keys: tuple[str, ...], root_path: str) -> Middleware:
    """Refuses (401) requests to all paths but those about health that bring none of `keys`, as a bearer token or in
    the header x-api-key. The page's own files are open too: it asks for the key."""
    is_known = _key_check(keys)
    prefixes = tuple(dict.fromkeys(("", root_path)))
    open_paths = {prefix + path for prefix in prefixes for path in (*OPEN_PATHS, "", "/")}
    page_paths = tuple(f"{prefix}/ui/" for prefix in prefixes)
    live_paths = {f"{path}live" for path in page_paths}

    def is_open(path: str) -> bool:
        return path in open_paths or (path.startswith(page_paths) and path not in live_paths)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_open(request.path) and request.method != "OPTIONS":
            given = [key for key in (_bearer_token(request), request.headers.get("x-api-key")) if key is not None]
            if not any(is_known(key) for key in given):
                message = "a valid API key is needed, as Authorization: Bearer KEY or as x-api-key: KEY"
                raise RequestError(message, status=401)
        return await handler(request)

    return guard


def vllm_api_key_guard(keys: tuple[str, ...], root_path: str) -> Middleware:
    """What vLLM does: only the versioned paths are guarded, only bearer tokens count, and the 401 has its own body."""
    is_known = _key_check(keys)
    guarded = (*VLLM_GUARDED_PATHS, *(root_path + path for path in VLLM_GUARDED_PATHS))

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path.startswith(guarded) and request.method != "OPTIONS":
            key = _bearer_token(request)
            if key is None or not is_known(key):
                return json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return guard


def _key_check(keys: tuple[str, ...]) -> Callable[[str], bool]:
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def is_known(key: str) -> bool:
        digest = hashlib.sha256(key.encode("utf-8", "replace")).digest()
        # All keys are compared, in constant time: the time taken tells nothing about them.
        matches = [hmac.compare_digest(digest, known) for known in digests]
        return any(matches)

    return is_known


def _bearer_token(request: web.Request) -> str | None:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else None
