"""The routes of the page: its files, out of the package and under a policy that lets nothing else load or run."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from aiohttp import ETag, web

from ..context import CONTEXT
from .live import LiveFeed

FOLDER = Path(__file__).with_name("static")
INDEX = "index.html"
CONTENT_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Everything from this server and nothing inline; and no text becomes markup or code by any of the DOM's ways to do so.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # ask each time, with the tag: a new version is seen at once
}


class _File(NamedTuple):
    content: bytes
    content_type: str
    tag: str


def add_page(app: web.Application, prefixes: tuple[str, ...]) -> None:
    """The page at `/` under each prefix, its files and the stream of the engine's load under `/ui/`."""
    feed = LiveFeed(app[CONTEXT])
    app.on_shutdown.append(feed.close)
    for prefix in prefixes:
        if prefix:
            app.router.add_get(prefix, _redirect)  # the page names its files relative to its own address
        app.router.add_get(f"{prefix}/", _show_index)
        app.router.add_get(f"{prefix}/ui/live", feed.show, allow_head=False)
        app.router.add_get(f"{prefix}/ui/{{name}}", _show_file)


async def _redirect(request: web.Request) -> web.Response:
    return web.Response(status=308, headers={"Location": f"{request.rel_url.raw_path}/"})


async def _show_index(request: web.Request) -> web.Response:
    return _respond(request, INDEX)


async def _show_file(request: web.Request) -> web.Response:
    name = request.match_info["name"]
    if name not in _names():
        raise web.HTTPNotFound
    return _respond(request, name)


def _respond(request: web.Request, name: str) -> web.Response:
    file = _read(name)
    known = request.if_none_match or ()
    is_known = any(tag.value in (file.tag, "*") for tag in known)
    response = web.Response(status=304, headers=HEADERS) if is_known else web.Response(
        body=file.content, content_type=file.content_type, charset="utf-8", headers=HEADERS
    )  # fmt: skip
    response.etag = ETag(file.tag)
    return response


@cache
def _names() -> frozenset[str]:
    return frozenset(file.name for file in FOLDER.iterdir() if file.suffix in CONTENT_TYPES)


@cache
def _read(name: str) -> _File:
    content = (FOLDER / name).read_bytes()
    return _File(content, CONTENT_TYPES[Path(name).suffix], hashlib.sha256(content).hexdigest()[:16])
