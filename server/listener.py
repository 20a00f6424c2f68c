"""From a listening socket to connections that speak HTTP, and what is said to bytes that do not."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from aiohttp import http_exceptions, web

from .environment import read_number
from .errors import ErrorInfo, ErrorResponse, error_response, json_response
from .sockets import LISTEN_BACKLOG, HeaderLimits


class Connection(web.RequestHandler):
    """One client's connection; what it sends that is no HTTP, or asks too much of it, is answered in the one error
    shape.
    """

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):  # raised before the application's middlewares: an unknown Expect
            resp = error_response(resp)
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer is not None and request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        response = _bad_http(exc) if status < HTTPStatus.INTERNAL_SERVER_ERROR else error_response(exc or Exception())
        response.force_close()
        return response


def _bad_http(error: BaseException | None) -> web.Response:
    """Nothing of what was sent is repeated: it may be anything."""
    status, message = HTTPStatus.BAD_REQUEST, "The request is not valid HTTP."
    if isinstance(error, http_exceptions.LineTooLong) or "Too many headers" in str(error):
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        message = "The head of the request is larger than this server takes; send fewer or shorter headers."
    return json_response(ErrorResponse(ErrorInfo(message, status.phrase, None, status.value)), status=status.value)


async def listen(
    runner: web.AppRunner,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    limits: HeaderLimits,
    accepted: Sequence[socket.socket] = (),
) -> asyncio.Server:
    """Answer the connections of `listener` with the application of `runner`, which has been set up.

    `accepted` are connections that were taken from it before, without TLS and with all their bytes still to be read.
    """
    loop = asyncio.get_running_loop()
    server = runner.server
    assert server is not None
    options: dict[str, Any] = {
        "access_log": None,
        "keepalive_timeout": read_number("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", 5),
        "max_line_size": limits.field_bytes,
        "max_field_size": limits.field_bytes,
        "max_headers": limits.num_fields,
    }

    def make_connection() -> Connection:
        return Connection(server, loop=loop, **options)

    for connection in accepted:
        await loop.connect_accepted_socket(make_connection, connection)
    return await loop.create_server(make_connection, sock=listener, ssl=tls, backlog=LISTEN_BACKLOG)
