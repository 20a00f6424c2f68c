"""The engine core as a process of its own: `python -m omni_engine.engine.core_process FD PINGS_FD`.

It reads messages from the socket it inherits, steps while there is work, and ends when the socket closes. Pings come
over a second socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import select
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from ..scheduler.request import RequestUpdate
from .config import EngineArgs, EngineConfig
from .heartbeat import StepClock, answer_pings
from .imports import quick_imports
from .logs import set_up_logging
from .messages import (
    FRAME_HEADER_BYTES,
    Abort,
    Add,
    Answer,
    Failed,
    Profile,
    ResetPrefixCache,
    Start,
    Stop,
    Updates,
    Watch,
    frame,
    to_core_decoder,
)
from .phases import PhaseTimer, process_age

if TYPE_CHECKING:
    from .core import EngineCore

logger = logging.getLogger(__name__)
READ_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1


class CoreChannel:
    """The core's end of the socket: blocking sends, and reads that wait only when there is nothing to compute."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()

    def send(self, message: msgspec.Struct) -> None:
        self._socket.sendall(frame(message))

    @property
    def has_news(self) -> bool:
        """Whether `receive` would return at once."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def receive(self, wait: bool) -> Iterator[object]:
        """The messages that have come; waits for one if asked to. Raises EOFError once the front has gone."""
        while wait or self.has_news:
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise EOFError("the front process closed the connection")
            self._buffer += data
            for message in self._messages():
                wait = False
                yield message

    def _messages(self) -> Iterator[object]:
        start = 0
        while len(self._buffer) - start >= FRAME_HEADER_BYTES:
            body = start + FRAME_HEADER_BYTES
            end = body + int.from_bytes(self._buffer[start:body], "little")
            if len(self._buffer) < end:
                break
            yield _decode(memoryview(self._buffer)[body:end].tobytes())
            start = end
        del self._buffer[:start]


def _decode(data: bytes) -> object:
    """One message. A request that cannot be read must not end those that can: it comes as its own refusal."""
    try:
        return to_core_decoder.decode(data)
    except msgspec.MsgspecError as error:
        raw = msgspec.msgpack.decode(data)
        request = raw.get("request") if isinstance(raw, dict) else None
        request_id = request.get("request_id") if isinstance(request, dict) else None
        if not isinstance(request_id, str):
            raise
        return RequestUpdate(request_id, finish_reason="error", error=str(error), error_kind="invalid")


def _die_with_parent() -> None:
    """Ask Linux to end this process when the front process dies, even in the middle of loading."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(channel: CoreChannel, clock: StepClock) -> None:
    """Load as the first message says, then step until told to stop. Raises EOFError when the front is gone."""
    with quick_imports():
        from .core import EngineCore

    timer = PhaseTimer(process_age())
    timer.done("imports")
    start = next(iter(channel.receive(wait=True)))
    timer.done("wait for the front")
    assert isinstance(start, Start)
    with contextlib.closing(EngineCore.load(EngineConfig.from_args(EngineArgs(**start.args)), timer)) as core:
        channel.send(msgspec.structs.replace(core.info, phases=timer.phases))
        _step_until_told(core, channel, clock)


def _step_until_told(core: EngineCore, channel: CoreChannel, clock: StepClock) -> None:
    while True:
        updates = []
        while not core.has_unfinished and not channel.has_news and core.prepare():
            pass
        for message in channel.receive(wait=not core.has_unfinished):
            if isinstance(message, Add):
                updates += core.add(message.request)
            elif isinstance(message, Abort):
                updates += core.abort(message.request_ids)
            elif isinstance(message, ResetPrefixCache):
                channel.send(Answer(message.number, core.reset_prefix_cache()))
            elif isinstance(message, Profile):
                channel.send(_profile(core, message))
            elif isinstance(message, Watch):
                core.watch(message.wanted)
            elif isinstance(message, RequestUpdate):
                updates.append(message)
            elif isinstance(message, Stop):
                return
        if core.has_unfinished:
            with clock:
                updates += core.step()
        channel.send(Updates(updates, core.stats(), core.take_load()))


def _profile(core: EngineCore, message: Profile) -> Answer:
    try:
        core.profile(starts=message.starts)
    except (RuntimeError, OSError) as error:
        return Answer(message.number, error=str(error))
    return Answer(message.number, done=True)


def main(argv: list[str]) -> int:
    _die_with_parent()
    # Signals of the terminal's process group are the front's to handle; it says Stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logging()
    channel = CoreChannel(socket.socket(fileno=int(argv[0])))
    clock = StepClock()
    answer_pings(socket.socket(fileno=int(argv[1])), clock)
    try:
        serve(channel, clock)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return 0
    except Exception as error:  # the front must learn why, whatever it was
        logger.debug("the engine core failed", exc_info=True)
        expected = isinstance(error, (ValueError, OSError, MemoryError))
        if not expected:
            logger.error("the engine core failed", exc_info=not logger.isEnabledFor(logging.DEBUG))
        message = str(error) if expected and str(error) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            channel.send(Failed(message))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
