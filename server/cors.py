"""Cross-origin requests of browsers: which pages may call this server, and with what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import hdrs, web

from .settings import CorsPolicy

if TYPE_CHECKING:
    from .middleware import Handler, Middleware

PREFLIGHT_MAX_AGE_SECONDS = 600
ALL_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


def install(policy: CorsPolicy, app: web.Application) -> None:
    """Put the headers on every answer of `app`, streams included."""

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None:
            response.headers.update(policy.origin_headers(origin))

    app.on_response_prepare.append(add_headers)


def preflight(policy: CorsPolicy) -> Middleware:
    """Answers a browser's question whether it may send a request."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        method = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        origin = request.headers.get(hdrs.ORIGIN)
        if request.method != hdrs.METH_OPTIONS or method is None or origin is None:
            return await handler(request)
        names = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        checks = {
            "origin": policy.allows_origin(origin),
            "method": policy.allows_method(method),
            "headers": policy.allows_headers(names),
        }
        wrong = [name for name, allowed in checks.items() if not allowed]
        if wrong:
            return web.Response(status=400, text=f"Disallowed CORS {', '.join(wrong)}")
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: ", ".join(ALL_METHODS if "*" in policy.methods else policy.methods),
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: names or ", ".join(name for name in policy.headers if name != "*"),
            hdrs.ACCESS_CONTROL_MAX_AGE: str(PREFLIGHT_MAX_AGE_SECONDS),
        }
        return web.Response(text="OK", headers={name: value for name, value in headers.items() if value})

    return answer
