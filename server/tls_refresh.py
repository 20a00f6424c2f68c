"""A renewed certificate without a restart (--enable-ssl-refresh): its files are watched, and loaded anew."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl

from .sockets import TlsFiles

logger = logging.getLogger(__name__)
INTERVAL_SECONDS = 5.0

Signature = tuple[tuple[int, int, int] | None, ...]


async def refresh_tls(files: TlsFiles, context: ssl.SSLContext, interval: float = INTERVAL_SECONDS) -> None:
    """Look at the files every `interval` seconds, for ever. New connections get what was loaded last.

    Files that do not fit each other, as while they are being replaced, are not loaded: the old ones stay.
    """
    seen = signature(files)
    while True:
        await asyncio.sleep(interval)
        now = signature(files)
        if now == seen:
            continue
        seen = now
        try:
            # In a context of its own first, since a failure would leave `context` with half of them.
            files.context()
            files.load_into(context)
        except ValueError as error:
            logger.warning("the renewed certificate is not used, the old one stays: %s", error)
            continue
        logger.info("the renewed certificate is used from now on: %s", files.certfile)


def signature(files: TlsFiles) -> Signature:
    """What changes when a file is written or replaced, by way of symbolic links too."""
    return tuple(_stat(path) for path in (files.certfile, files.keyfile, files.ca_certs) if path)


def _stat(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
