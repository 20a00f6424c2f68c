"""The stream of the engine's load: one sampler for all who look, and none while nobody does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack

import msgspec
from aiohttp import web

from ... import __version__
from ...engine.load import LoadMeter, LoadSample
from ...engine.phases import Phase
from ..context import ServerContext
from ..errors import error_info
from ..streaming import send_events

logger = logging.getLogger(__name__)
INTERVAL_SECONDS = 1.0
MAX_PENDING_EVENTS = 8  # for one viewer; of one who reads more slowly the oldest are dropped


class StartPhases(msgspec.Struct, frozen=True):
    """The phases of one process's start, one after another."""

    process: str
    phases: list[Phase]


class EngineEvent(msgspec.Struct, frozen=True, tag_field="event", tag="engine"):
    """What does not change while the engine runs; sent first, and again when its status changes."""

    status: str  # loading | ready | dead
    message: str | None  # what it died of, as clients are told
    version: str
    model: str
    interval: float  # seconds between two samples
    max_model_len: int | None = None  # these are None until the engine is ready
    block_size: int | None = None
    num_blocks: int | None = None  # that requests can have
    gears: list[int] | None = None
    num_drafts: int | None = None  # most tokens drafted at once; 0: no speculation
    start: list[StartPhases] = []


class LoadEvent(msgspec.Struct, frozen=True, tag_field="event", tag="load"):
    """The load of one interval."""

    time: float  # seconds since the epoch
    load: LoadSample


class LiveFeed:
    """Samples the engine's load once for everybody who reads `show`.

    The first viewer begins the watch over the engine and the last one who leaves ends it; in between there is one
    task, however many look.
    """

    def __init__(self, context: ServerContext, interval: float = INTERVAL_SECONDS) -> None:
        self._context = context
        self._interval = interval
        self._viewers: set[asyncio.Queue[EngineEvent | LoadEvent | None]] = set()
        self._watch = ExitStack()
        self._task: asyncio.Task[None] | None = None

    async def show(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: the engine, then its load every interval, until the viewer or the server leaves."""
        return await send_events(request, self.events())

    async def events(self) -> AsyncGenerator[EngineEvent | LoadEvent, None]:
        """What one viewer is sent."""
        viewer: asyncio.Queue[EngineEvent | LoadEvent | None] = asyncio.Queue(MAX_PENDING_EVENTS)
        self._join(viewer)
        try:
            yield self._engine_event()
            while (event := await viewer.get()) is not None:
                yield event
        finally:
            self._leave(viewer)

    async def close(self, _app: web.Application) -> None:
        """The server ends, so every stream does."""
        self._tell(None)

    def _join(self, viewer: asyncio.Queue[EngineEvent | LoadEvent | None]) -> None:
        self._viewers.add(viewer)
        if self._task is None:
            meter = self._watch.enter_context(self._context.engine.watched())
            self._task = asyncio.create_task(self._sample(meter))

    def _leave(self, viewer: asyncio.Queue[EngineEvent | LoadEvent | None]) -> None:
        self._viewers.discard(viewer)
        if not self._viewers and self._task is not None:
            self._task.cancel()
            self._task = None
            self._watch.close()

    async def _sample(self, meter: LoadMeter) -> None:
        told = self._status()
        try:
            while True:
                await asyncio.sleep(self._interval)
                if self._status() != told:
                    told = self._status()
                    self._tell(self._engine_event())
                self._tell(LoadEvent(time.time(), meter.sample(time.monotonic())))
        except Exception:  # a fault of ours must not leave viewers waiting
            logger.exception("sampling the engine's load failed")
            self._tell(None)

    def _tell(self, event: EngineEvent | LoadEvent | None) -> None:
        for viewer in self._viewers:
            if viewer.full():
                viewer.get_nowait()
            viewer.put_nowait(event)

    def _status(self) -> str:
        engine = self._context.engine
        return "dead" if engine.errored else "ready" if engine.is_ready else "loading"

    def _engine_event(self) -> EngineEvent:
        engine, status = self._context.engine, self._status()
        message = None if engine.dead_error is None else error_info(engine.dead_error).message
        event = EngineEvent(status, message, __version__, self._context.model_name, self._interval)
        info = engine.core_info
        if info is None:
            return event
        speculation = engine.config.speculation
        return msgspec.structs.replace(
            event,
            max_model_len=info.max_model_len,
            block_size=info.block_size,
            num_blocks=info.num_blocks - 1,  # but the null block
            gears=info.gears,
            num_drafts=0 if speculation is None else speculation.choice.num_drafts,
            start=[StartPhases(process, list(phases)) for process, phases in engine.start_phases],
        )
