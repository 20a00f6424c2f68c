"""What an engine tells of its start and its work: Prometheus metrics, lines in the log, the load while one looks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from ..scheduler.request import RequestInput
from .config import EngineConfig
from .load import LoadMeter
from .messages import CoreInfo, Updates
from .metrics import EngineMetrics, cache_config
from .output_processor import ProcessedUpdates
from .phases import Phase, PhaseTimer, log_start
from .stats_log import StatsLog


class Telemetry:
    """`meter` is there while somebody looks; metrics and lines, unless `disable_log_stats` is set. `timer` has the
    phases of the start before the core was waited for."""

    def __init__(self, timer: PhaseTimer, *, disable_log_stats: bool) -> None:
        self.meter: LoadMeter | None = None
        self.start_phases: list[tuple[str, list[Phase]]] = []  # of each process, once the core is ready
        self._timer: PhaseTimer | None = timer
        self._log = None if disable_log_stats else StatsLog(time.monotonic())
        self._metrics: EngineMetrics | None = None

    def begin(self, registry: CollectorRegistry, served_model_name: str, config: EngineConfig, info: CoreInfo) -> None:
        """The core is ready, for the first time or again: its start is logged; metrics go into `registry`, and stay."""
        self.start_phases = [("core", info.phases)]
        if self._timer is not None:  # a core that is started anew tells of its own phases only
            self._timer.done("wait for the core")
            self.start_phases.insert(0, ("front", self._timer.phases))
            self._timer = None
        log_start(self.start_phases)
        if self._log is None or self._metrics is not None:
            return
        num_drafts = 0 if config.speculation is None else config.speculation.choice.num_drafts
        cache = cache_config(config.args, info)
        self._metrics = EngineMetrics(registry, served_model_name, info.max_model_len, cache, num_drafts=num_drafts)

    @contextmanager
    def watch(self) -> Iterator[LoadMeter]:
        """A meter from here to the end of the block; one at a time: RuntimeError."""
        if self.meter is not None:
            raise RuntimeError(f"the engine is watched already; share the meter: {self.meter}")
        self.meter = LoadMeter(time.monotonic())
        try:
            yield self.meter
        finally:
            self.meter = None

    def add(self, core_requests: Iterable[RequestInput]) -> None:
        """These go to the core now."""
        if self._metrics is not None:
            self._metrics.add(core_requests)

    def reject_for_grammars(self) -> None:
        """A request finds no place to have its grammar tried."""
        if self._metrics is not None:
            self._metrics.rejected_by_grammars()

    def end(self, core_ids: Iterable[str], reason: str) -> None:
        """These have ended otherwise than by the core's updates."""
        if self._metrics is not None:
            for core_id in core_ids:
                self._metrics.end(core_id, reason)

    def lose_core(self) -> None:
        """Nothing of what was being computed will come."""
        if self._metrics is not None:
            self._metrics.core_lost()
        if self.meter is not None:
            self.meter.core_lost()

    def take(self, message: Updates, result: ProcessedUpdates) -> None:
        """What the core says, and what that comes to for the requests."""
        if self._metrics is not None:
            self._metrics.take(message.updates, message.stats)
        self.end(result.core_ids_to_abort, "stop")  # what ends with an error has been counted by now
        if self._log is not None:
            self._log.count(message.stats, result.num_prompt_tokens, result.num_new_tokens)
        if self.meter is not None:
            self.meter.take(
                message.updates, message.stats, message.load,
                result.num_prompt_tokens, result.num_new_tokens, time.monotonic(),
            )  # fmt: skip

    async def write_log(self, is_over: Callable[[], bool]) -> None:
        """Write a line from time to time, if any are wanted."""
        while self._log is not None and not is_over():
            await asyncio.sleep(self._log.interval)
            self._log.write()
