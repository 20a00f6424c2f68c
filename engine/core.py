"""The engine core: schedule, execute, update. One step reads as the step."""

from __future__ import annotations

from collections.abc import Iterable

from ..scheduler.request import RequestInput, RequestUpdate
from ..scheduler.scheduler import Scheduler, SchedulerStats
from .config import EngineConfig
from .messages import CoreInfo
from .model_runner import ModelRunner
from .startup import load_core_parts


class EngineCore:
    """Scheduler and model runner of one engine. Not thread-safe: one loop drives it."""

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, info: CoreInfo) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.info = info

    @classmethod
    def load(cls, config: EngineConfig) -> EngineCore:
        """Load weights and allocate the cache; raises with a message that says what to change."""
        parts = load_core_parts(config)
        return cls(parts.scheduler, parts.runner, CoreInfo(parts.max_model_len, parts.num_blocks, config.block_size))

    def add(self, request: RequestInput) -> list[RequestUpdate]:
        """Queue a request; an update comes back at once if it is refused."""
        refusal = self.scheduler.add(request)
        return [] if refusal is None else [refusal]

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        return self.scheduler.abort(request_ids)

    def step(self) -> list[RequestUpdate]:
        """Compute the next tokens of some requests; returns what that changed."""
        plan = self.scheduler.schedule()
        if not plan.rows:
            return []
        output = self.runner.execute(plan)
        return self.scheduler.update(plan, output)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def stats(self) -> SchedulerStats:
        return self.scheduler.stats()

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.kv.reset_prefix_cache()
