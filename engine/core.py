"""The engine core: schedule, launch, read, update. One step reads as the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from ..scheduler.plan import StepOutput, StepPlan
from ..scheduler.request import RequestInput, RequestUpdate
from ..scheduler.scheduler import Scheduler, SchedulerStats
from .config import EngineConfig
from .messages import CoreInfo
from .model_runner import ModelRunner
from .phases import PhaseTimer
from .pooling_runner import PoolingRunner
from .pooling_startup import load_pooling_parts
from .startup import load_core_parts


class EngineCore:
    """Scheduler and model runner of one engine. Not thread-safe: one loop drives it.

    With `overlap` the next step is planned and launched before the tokens of the last one are read, so the device
    finds its next work waiting, and the host's work on a step's tokens happens while the next one is computed. On a
    CPU, whose operations do not return before they are done, the steps run in a thread of their own.
    """

    def __init__(
        self, scheduler: Scheduler, runner: ModelRunner | PoolingRunner, info: CoreInfo, *, overlap: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.runner: Any = runner
        self.info = info
        self._max_in_flight = 2 if overlap else 1
        self._in_flight: deque[tuple[StepPlan, Callable[[], StepOutput]]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        if overlap and runner.device.type == "cpu":
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")

    @classmethod
    def load(
        cls, config: EngineConfig, timer: PhaseTimer | None = None, acceptance_rates: tuple[float, ...] | None = None
    ) -> EngineCore:
        """Load weights and allocate the cache; raises with a message that says what to change. `acceptance_rates`, for
        benchmarks only: drafts are accepted by lot, and the tokens mean nothing."""
        timer = timer or PhaseTimer()
        if config.pooling is None:
            parts = load_core_parts(config, timer, acceptance_rates)
        else:
            parts = load_pooling_parts(config, timer)
        info = CoreInfo(parts.max_model_len, parts.num_blocks, parts.scheduler.kv.block_size)
        return cls(parts.scheduler, parts.runner, info, overlap=config.args.async_scheduling)

    def add(self, request: RequestInput) -> list[RequestUpdate]:
        """Queue a request; an update comes back at once if it is refused."""
        refusal = self.scheduler.add(request)
        return [] if refusal is None else [refusal]

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        return self.scheduler.abort(request_ids)

    def step(self) -> list[RequestUpdate]:
        """Launch what can be launched and read the oldest step; returns what that changed."""
        while self.scheduler.next_output_is_dropped:  # computed for requests that had ended, or were aborted since
            self._read()
        while len(self._in_flight) < self._max_in_flight:
            plan = self.scheduler.schedule()
            if not plan.rows:
                break
            self._in_flight.append((plan, self._launch(plan)))
        return self._read() if self._in_flight else []

    def _read(self) -> list[RequestUpdate]:
        plan, output = self._in_flight.popleft()
        return self.scheduler.update(plan, output())

    def _launch(self, plan: StepPlan) -> Callable[[], StepOutput]:
        """Start a step; the result waits for its output."""
        if self._thread is not None:
            return self._thread.submit(self.runner.execute, plan).result
        return partial(self.runner.read, self.runner.dispatch(plan))

    def close(self) -> None:
        """Wait for the steps in flight and stop everything in the background. Nothing may be called afterwards."""
        if self._thread is not None:
            self._thread.shutdown()
        self.runner.close()

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.kv.reset_prefix_cache()
