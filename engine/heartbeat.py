"""How the front notices that the core process hangs: a thread of the core echoes bytes, whatever the core computes.

A step may take long, so the loop that steps cannot be the one to answer. A process that is stopped, frozen or starved
answers nothing, though its socket stays open.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

INTERVAL_SECONDS = 1.0
MAX_MISSED = 5
_READ_BYTES = 4096


def answer_pings(connection: socket.socket) -> None:
    """In the core: echo what comes, in a thread of its own, until the front closes its end."""

    def echo() -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(_READ_BYTES):
                connection.sendall(data)

    threading.Thread(target=echo, name="heartbeat", daemon=True).start()


async def watch(connection: socket.socket, interval: float = INTERVAL_SECONDS, max_missed: int = MAX_MISSED) -> bool:
    """In the front: ping every `interval` seconds over the non-blocking `connection`. True once `max_missed` pings in
    a row had no answer; False when the core has closed its end, which its other socket tells too.

    What is counted is pings and not time: a front that was itself asleep for long has missed one answer, not all.
    """
    missed = 0
    while missed < max_missed:
        with contextlib.suppress(OSError):
            connection.send(b".")
        await asyncio.sleep(interval)
        try:
            answer = connection.recv(_READ_BYTES)
        except BlockingIOError:
            missed += 1
            continue
        except OSError:
            return False
        if not answer:
            return False
        missed = 0
    return True
