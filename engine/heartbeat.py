"""How the front notices that the core process hangs: a thread of the core answers pings, whatever the core computes.

A step may take long, so the loop that steps cannot be the one to answer. A process that is stopped, frozen or starved
answers nothing, though its socket stays open. One whose loop hangs in a step answers for how long that step has run.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time

from .core_launch import DEFAULT_STEP_TIMEOUT_SECONDS

INTERVAL_SECONDS = 1.0
MAX_MISSED = 5
_READ_BYTES = 4096  # whole answers
_ANSWER = struct.Struct("<d")  # seconds that the step in progress has run


class StepClock:
    """Entered by the loop around each step, read by the thread that answers pings."""

    def __init__(self) -> None:
        self._started: float | None = None

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_error: object) -> None:
        self._started = None

    def seconds(self) -> float:
        """How long the step in progress has run; 0 between steps."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started


def answer_pings(connection: socket.socket, clock: StepClock) -> None:
    """In the core: answer what comes, in a thread of its own, until the front closes its end."""

    def answer() -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(_READ_BYTES):
                connection.sendall(_ANSWER.pack(clock.seconds()))

    threading.Thread(target=answer, name="heartbeat", daemon=True).start()


async def watch(
    connection: socket.socket,
    *,
    interval: float = INTERVAL_SECONDS,
    max_missed: int = MAX_MISSED,
    step_timeout: float = DEFAULT_STEP_TIMEOUT_SECONDS,
) -> str | None:
    """In the front: ping every `interval` seconds over the non-blocking `connection`. Returns why the core counts as
    hung: `max_missed` pings in a row had no answer, or a step has run for `step_timeout` seconds (0: it may run for
    ever). None when the core has closed its end, which its other socket tells too.

    Missed are pings and not time: a front that was itself asleep for long has missed one answer, not all.
    """
    missed = 0
    while missed < max_missed:
        with contextlib.suppress(OSError):
            connection.send(b".")
        await asyncio.sleep(interval)
        try:
            answers = connection.recv(_READ_BYTES)
        except BlockingIOError:
            missed += 1
            continue
        except OSError:
            return None
        if not answers:
            return None
        missed = 0
        (seconds,) = _ANSWER.unpack(answers[-_ANSWER.size :])
        if 0 < step_timeout < seconds:
            return f"has been in one step for more than {step_timeout:g} s (--engine-hang-timeout)"
    return "does not answer any more"
