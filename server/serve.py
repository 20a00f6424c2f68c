"""`omni-engine serve`: the life of the server from bind to shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from ssl import SSLContext
from typing import Any

from aiohttp import web

from .. import __version__
from ..engine.async_engine import AsyncEngine
from ..engine.config import EngineArgs
from ..engine.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, logs_json, set_up_logging
from .app import build_app
from .arguments import engine_args
from .config_file import config_text, parse_with_config
from .context import ServerSettings
from .environment import read_flag, read_number
from .listener import HeaderLimits, address_of, bind, bind_unix, listen, remove_unix
from .serve_arguments import header_limits, serve_parser, server_settings, take_model_argument, tls_files

logger = logging.getLogger(__name__)
# Once their requests are aborted, handlers need only this long to write their last words.
HANDLER_GRACE_SECONDS = 2.0
DEATH_POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 1.0


def run_serve(words: Sequence[str]) -> int:
    """Serve as the command line says, until a signal; returns the exit status."""
    parser = serve_parser()
    arguments = parse_with_config(parser, words)
    for variable, value in ((LEVEL_VARIABLE, arguments.log_level), (FORMAT_VARIABLE, arguments.log_format)):
        if value is not None:
            os.environ[variable] = value
    set_up_logging()
    take_model_argument(parser, arguments)
    args = engine_args(arguments)
    if arguments.shutdown_timeout < 0:
        parser.error(f"--shutdown-timeout must not be negative: {arguments.shutdown_timeout}")
    settings = server_settings(arguments, args)
    tls = tls_files(parser, arguments)
    limits = header_limits(parser, arguments)
    if arguments.print_config:
        print(config_text(arguments, args), end="")
        return 0
    tls_context = None if tls is None else tls.context()
    listener = bind(arguments.host, arguments.port) if arguments.uds is None else bind_unix(arguments.uds)
    with listener:
        server = _Server(
            args,
            settings,
            listener,
            arguments.shutdown_timeout,
            tls=tls_context,
            limits=limits,
            restart_core=arguments.restart_core,
        )
        try:
            asyncio.run(server.run())
        finally:
            remove_unix(listener)
    return 0


class _Server:
    """One run of the server: listen, load, serve, drain."""

    def __init__(
        self,
        args: EngineArgs,
        settings: ServerSettings,
        listener: socket.socket,
        shutdown_timeout: float = 0.0,
        *,
        tls: SSLContext | None = None,
        limits: HeaderLimits = HeaderLimits(),  # noqa: B008  (frozen)
        restart_core: bool = False,
    ) -> None:
        self.listener = listener
        self.settings = settings
        self.shutdown_timeout = shutdown_timeout
        self.tls = tls
        self.limits = limits
        name = settings.served_model_names[0] if settings.served_model_names else settings.model
        self.engine = AsyncEngine.from_engine_args(args, start=False, served_model_name=name, restart_core=restart_core)
        self.stop = asyncio.Event()  # the first signal
        self.hurry = asyncio.Event()  # the second

    async def run(self) -> None:
        """Serve until a signal. Raises what kept the model from loading, or what the engine died of."""
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, self._on_signal)
        app = build_app(self.engine, self.settings)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=HANDLER_GRACE_SECONDS)
        await runner.setup()
        site = await listen(runner, self.listener, self.tls, self.limits)
        address = address_of(self.listener, tls=self.tls is not None)
        _note(f"omni-engine {__version__} listens on {address} and loads {self.settings.model}")
        try:
            if await self._load():
                _note(f"ready after {time.monotonic() - started:.1f} s: {address}/v1/chat/completions")
                await self._serve()
            site.close()
            await self._drain()
        finally:
            site.close()
            await self.engine.shutdown()
            await runner.cleanup()

    def _on_signal(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()

    async def _load(self) -> bool:
        """Start the engine and wait until it is ready; False if a signal came first."""
        loading = asyncio.create_task(self._start_engine())
        stopping = asyncio.create_task(self.stop.wait())
        # No limit unless one is set: how long weights take to read is not ours to say.
        limit = read_number("VLLM_ENGINE_READY_TIMEOUT_S", 0) or None
        done, _ = await asyncio.wait({loading, stopping}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        loaded = loading.done()
        await _cancel(loading, stopping)
        if loaded:
            loading.result()
        if not done:
            raise RuntimeError(f"the model was not loaded in time; raise VLLM_ENGINE_READY_TIMEOUT_S: {limit}")
        return loaded

    async def _start_engine(self) -> None:
        await self.engine.start()
        await self.engine.wait_ready()

    async def _serve(self) -> None:
        keeps_alive = read_flag("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH")
        while not self.stop.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stop.wait(), DEATH_POLL_SECONDS)
            error = self.engine.dead_error
            if error is not None and not keeps_alive:
                # Whoever asks for its health must have a chance to learn it.
                await asyncio.sleep(LAST_WORDS_SECONDS)
                raise error

    async def _drain(self) -> None:
        """Let running requests end within the timeout; a second signal cuts it short."""
        draining = asyncio.create_task(self.engine.shutdown(self.shutdown_timeout))
        hurrying = asyncio.create_task(self.hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(draining, hurrying)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and wait for it to end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _note(text: str) -> None:
    """What the operator is told whatever the log level."""
    if logs_json():
        logger.info(text)
    else:
        print(text, file=sys.stderr, flush=True)
