"""Cross-origin requests of browsers: which pages may call this server, and with what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import hdrs, web

if TYPE_CHECKING:
    from .middleware import Handler, Middleware

PREFLIGHT_MAX_AGE_SECONDS = 600
ALL_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")


@dataclass(frozen=True)
class CorsPolicy:
    """What is allowed; "*" in a list allows everything. Without origins the server says nothing about CORS."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False

    def allows_origin(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def allows_method(self, method: str) -> bool:
        return "*" in self.methods or method in self.methods

    def allows_headers(self, names: str) -> bool:
        allowed = {name.lower() for name in self.headers}
        return "*" in allowed or all(name.strip().lower() in allowed for name in names.split(",") if name.strip())

    def origin_headers(self, origin: str) -> dict[str, str]:
        """The headers of any answer to a page of `origin`."""
        if not self.allows_origin(origin):
            return {}
        # A browser takes no wildcard together with credentials.
        anyone = "*" in self.origins and not self.credentials
        headers: dict[str, str] = {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: "*"} if anyone else {
            hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin, hdrs.VARY: "Origin",
        }  # fmt: skip
        if self.credentials:
            headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"
        return headers

    def install(self, app: web.Application) -> None:
        """Put the headers on every answer of `app`, streams included."""

        async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
            origin = request.headers.get(hdrs.ORIGIN)
            if origin is not None:
                response.headers.update(self.origin_headers(origin))

        app.on_response_prepare.append(add_headers)

    def preflight(self) -> Middleware:
        """Answers a browser's question whether it may send a request."""

        @web.middleware
        async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
            method = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
            origin = request.headers.get(hdrs.ORIGIN)
            if request.method != hdrs.METH_OPTIONS or method is None or origin is None:
                return await handler(request)
            names = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
            checks = {
                "origin": self.allows_origin(origin),
                "method": self.allows_method(method),
                "headers": self.allows_headers(names),
            }
            wrong = [name for name, allowed in checks.items() if not allowed]
            if wrong:
                return web.Response(status=400, text=f"Disallowed CORS {', '.join(wrong)}")
            headers = {
                hdrs.ACCESS_CONTROL_ALLOW_METHODS: ", ".join(ALL_METHODS if "*" in self.methods else self.methods),
                hdrs.ACCESS_CONTROL_ALLOW_HEADERS: names or ", ".join(name for name in self.headers if name != "*"),
                hdrs.ACCESS_CONTROL_MAX_AGE: str(PREFLIGHT_MAX_AGE_SECONDS),
            }
            return web.Response(text="OK", headers={name: value for name, value in headers.items() if value})

        return answer
