"""The socket that the server listens on, its TLS, and what is said to bytes that are no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from aiohttp import http_exceptions, web

from .environment import read_number
from .errors import ErrorInfo, ErrorResponse, error_response, json_response

LISTEN_BACKLOG = 2048


@dataclass(frozen=True)
class TlsFiles:
    """Where the certificate is, and what is asked of clients: 0 nothing, 1 a certificate if they like, 2 one."""

    certfile: str
    keyfile: str | None = None
    ca_certs: str | None = None
    cert_reqs: int = 0
    ciphers: str | None = None

    def context(self) -> ssl.SSLContext:
        """Raises ValueError if a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certfile, self.keyfile)
            if self.ca_certs:
                context.load_verify_locations(self.ca_certs)
            if self.ciphers:
                context.set_ciphers(self.ciphers)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (self.certfile, self.keyfile, self.ca_certs, self.ciphers)))
            raise ValueError(f"TLS cannot be set up ({error}); check the --ssl flags: {files}") from error
        context.verify_mode = ssl.VerifyMode(self.cert_reqs)
        return context


@dataclass(frozen=True)
class HeaderLimits:
    """What the head of a request may hold; more is answered with an error before anything else is read."""

    field_bytes: int = 64 * 1024  # of the request line, and of each header
    num_fields: int = 256


def bind(host: str | None, port: int) -> socket.socket:
    """A listening socket. It accepts connections from now on; they are answered once the server runs."""
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host or "", port))
        listener.listen(LISTEN_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen ({reason}); choose another --host or --port: {host or '*'}:{port}") from error
    return listener


def bind_unix(path: str) -> socket.socket:
    """A listening unix socket at `path`. A file that a dead server left there is replaced, a live one is not."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket() and not _is_served(path):
            os.unlink(path)
        listener.bind(path)
        listener.listen(LISTEN_BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen ({error.strerror or error}); choose another --uds: {path}") from error
    return listener


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def remove_unix(listener: socket.socket) -> None:
    """Take away the file of a unix socket; of any other there is none."""
    if listener.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            os.unlink(listener.getsockname())


def address_of(listener: socket.socket, *, tls: bool = False) -> str:
    """What clients are told to connect to."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


class Connection(web.RequestHandler):
    """One client's connection; what it sends that is no HTTP is answered in the one error shape."""

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
    runner: web.AppRunner, listener: socket.socket, tls: ssl.SSLContext | None, limits: HeaderLimits
) -> asyncio.Server:
    """Answer the connections of `listener` with the application of `runner`, which has been set up."""
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
    return await loop.create_server(
        lambda: Connection(server, loop=loop, **options), sock=listener, ssl=tls, backlog=LISTEN_BACKLOG
    )
