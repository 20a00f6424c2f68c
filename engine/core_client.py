"""The front's end of the core process: starts it, sends to it, reads what it says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from dataclasses import asdict
from typing import Any

import msgspec

from .config import EngineArgs
from .core_launch import LaunchedCore, launch_core
from .errors import EngineDeadError
from .heartbeat import watch
from .messages import FRAME_HEADER_BYTES, Answer, CoreInfo, Failed, Start, Stop, Updates, frame, from_core_decoder

STREAM_LIMIT_BYTES = 1 << 24


class CoreClient:
    """One engine core process and the sockets to it: messages, and pings. All methods belong to one event loop."""

    def __init__(self, process: subprocess.Popen[bytes], reader: Any, writer: Any, pings: socket.socket) -> None:
        self.process = process
        self._pings = pings
        self._reader: asyncio.StreamReader = reader
        self._writer: asyncio.StreamWriter = writer

    @classmethod
    async def spawn(cls, args: EngineArgs, core: LaunchedCore | None = None) -> CoreClient:
        """Start the process, or take one that has just been launched, and tell it what to load; returns before it
        has loaded.
        """
        core = core or launch_core()
        core.messages.setblocking(False)
        core.pings.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=core.messages, limit=STREAM_LIMIT_BYTES)
        client = cls(core.process, reader, writer, core.pings)
        client.send(Start(asdict(args)))
        return client

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; it is dropped if the core is gone, which `receive` reports."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> CoreInfo | Updates | Answer:
        """The next message; raises `EngineDeadError` once the core has failed or ended."""
        try:
            header = await self._reader.readexactly(FRAME_HEADER_BYTES)
            body = await self._reader.readexactly(int.from_bytes(header, "little"))
        except (asyncio.IncompleteReadError, OSError) as error:
            code = await self._exit_code()
            raise EngineDeadError(f"the engine core process ended, exit code {code}; its log says why") from error
        message = from_core_decoder.decode(body)
        if isinstance(message, Failed):
            raise EngineDeadError(message.message)
        return message

    async def wait_until_hung(self, step_timeout: float) -> str | None:
        """Why the process counts as hung, once it does: it does not answer, or one of its steps takes longer than
        `step_timeout` seconds (0: no limit). None once it has ended.
        """
        return await watch(self._pings, step_timeout=step_timeout)

    async def _exit_code(self) -> int | None:
        for _ in range(50):
            if self.process.poll() is not None:
                break
            await asyncio.sleep(0.02)
        return self.process.returncode

    async def close(self, timeout: float = 2.0) -> None:
        """Stop the core, by force if it has not ended within `timeout` seconds."""
        self.send(Stop())
        deadline = asyncio.get_running_loop().time() + timeout
        with contextlib.suppress(OSError):
            await asyncio.wait_for(self._writer.drain(), timeout)
        while self.process.poll() is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        self.kill()

    def kill(self) -> None:
        """End the process by force if it has not ended, and close the sockets."""
        self._writer.close()
        self._pings.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
