"""The life of the server: listen, load, serve, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from ssl import SSLContext
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .. import __version__
from ..engine.async_engine import AsyncEngine
from ..engine.config import EngineArgs
from ..engine.core_launch import DEFAULT_STEP_TIMEOUT_SECONDS, LaunchedCore
from ..engine.logs import logs_json
from ..engine.phases import PhaseTimer, process_age
from ..engine.tracing import RequestTracer
from .app import build_app
from .early import EarlyAnswers
from .environment import read_flag, read_number
from .listener import listen
from .settings import ServerSettings
from .sockets import HeaderLimits, TlsFiles, address_of
from .tls_refresh import refresh_tls

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)
# Once their requests are aborted, handlers need only this long to write their last words.
HANDLER_GRACE_SECONDS = 2.0
DEATH_POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 1.0


class Server:
    """One run of the server: listen, load, serve, drain."""

    def __init__(
        self,
        args: EngineArgs,
        settings: ServerSettings,
        listener: socket.socket,
        shutdown_timeout: float = 0.0,
        *,
        tls: SSLContext | None = None,
        refreshed_tls: TlsFiles | None = None,
        limits: HeaderLimits = HeaderLimits(),  # noqa: B008  (frozen)
        restart_core: bool = False,
        hang_timeout: float = DEFAULT_STEP_TIMEOUT_SECONDS,
        core: LaunchedCore | None = None,
        early: EarlyAnswers | None = None,
        timer: PhaseTimer | None = None,
        exporter: SpanExporter | None = None,
    ) -> None:
        self.listener = listener
        self.early = early
        self.settings = settings
        self.shutdown_timeout = shutdown_timeout
        self.tls = tls
        self.refreshed_tls = refreshed_tls
        self.limits = limits
        name = settings.served_model_names[0] if settings.served_model_names else settings.model
        self.engine = AsyncEngine.from_engine_args(
            args,
            start=False,
            served_model_name=name,
            restart_core=restart_core,
            hang_timeout=hang_timeout,
            core=core,
            timer=timer,
            tracer=None if exporter is None else RequestTracer(exporter, name),
        )
        self.stop = asyncio.Event()  # the first signal
        self.hurry = asyncio.Event()  # the second

    async def run(self) -> None:
        """Serve until a signal. Raises what kept the model from loading, or what the engine died of."""
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, self._on_signal)
        app = build_app(self.engine, self.settings)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=HANDLER_GRACE_SECONDS)
        await runner.setup()
        accepted = [] if self.early is None else self.early.finish()
        site = await listen(runner, self.listener, self.tls, self.limits, accepted)
        address = address_of(self.listener, tls=self.tls is not None)
        _note(f"omni-engine {__version__} listens on {address} and loads {self.settings.model}")
        refreshing = self._refresh_tls()
        try:
            if await self._load():
                api = "/v1/chat/completions" if self.engine.pooling_config is None else "/pooling"
                _note(f"ready after {process_age():.1f} s: {address}{api}")
                await self._serve()
            site.close()
            await self._drain()
        finally:
            site.close()
            await _cancel(*refreshing)
            await self.engine.shutdown()
            await runner.cleanup()

    def _refresh_tls(self) -> list[asyncio.Task[None]]:
        """The task that watches the certificate, if that is wanted."""
        if self.tls is None or self.refreshed_tls is None:
            return []
        return [asyncio.create_task(refresh_tls(self.refreshed_tls, self.tls))]

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
        self.engine.warm_up_grammars()

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
