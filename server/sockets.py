"""The socket that the server listens on, its TLS files and its limits; imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl

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
        import ssl  # servers without TLS start sooner without it

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.load_into(context)
        context.verify_mode = ssl.VerifyMode(self.cert_reqs)
        return context

    def load_into(self, context: ssl.SSLContext) -> None:
        """Read the files. Raises ValueError if one cannot be used; `context` may hold some of them then."""
        import ssl

        try:
            context.load_cert_chain(self.certfile, self.keyfile)
            if self.ca_certs:
                context.load_verify_locations(self.ca_certs)
            if self.ciphers:
                context.set_ciphers(self.ciphers)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (self.certfile, self.keyfile, self.ca_certs, self.ciphers)))
            raise ValueError(f"TLS cannot be set up ({error}); check the --ssl flags: {files}") from error


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


def remove_unix(path: str) -> None:
    """Take away the file of a unix socket that is not served any more."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def address_of(listener: socket.socket, *, tls: bool = False) -> str:
    """What clients are told to connect to."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
