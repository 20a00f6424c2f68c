"""The engine core: schedule, launch, read, update. One step reads as the step."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import msgspec

from ..kvcache.pages import CachePages
from ..ops.cpu.threads import release_team
from ..scheduler.plan import StepOutput, StepPlan
from ..scheduler.request import RequestInput, RequestUpdate
from ..scheduler.scheduler import Scheduler, SchedulerStats
from .config import EngineConfig
from .load import CoreLoad, StepReport
from .messages import CoreInfo
from .model_runner import ModelRunner
from .phases import PhaseTimer
from .pooling.runner import PoolingRunner
from .pooling.startup import load_pooling_parts
from .profiling import StepProfiler, choose_profiler
from .startup import load_core_parts
from .structured.store import GrammarStore

logger = logging.getLogger(__name__)

# With nothing to compute, as long as this for a grammar; then whoever drives the core may have news.
GRAMMAR_WAIT_SECONDS = 0.02


class EngineCore:
    """Scheduler and model runner of one engine. Not thread-safe: one loop drives it.

    With `overlap` the next step is planned and launched before the tokens of the last one are read, so the device
    finds its next work waiting, and the host's work on a step's tokens happens while the next one is computed. On a
    CPU, whose operations do not return before they are done, the steps run in a thread of their own.

    A request with a grammar comes to the scheduler once the grammar has been compiled, which `grammars` does in the
    background; others do not wait for it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner | PoolingRunner,
        info: CoreInfo,
        *,
        overlap: bool = False,
        grammars: GrammarStore | None = None,
        uses_whole_cache: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.runner: Any = runner
        self.info = info
        self.grammars = grammars
        self._waiting_for_grammar: dict[str, tuple[RequestInput, Future[None]]] = {}
        self._max_in_flight = 2 if overlap else 1
        self._in_flight: deque[tuple[StepPlan, Callable[[], StepOutput]]] = deque()
        self._profiler: StepProfiler | None = None
        self._pages = CachePages(runner.caches)
        self._uses_whole_cache = uses_whole_cache  # who says how large it is means to use it
        self._thread: ThreadPoolExecutor | None = None
        self._reports: list[StepReport] | None = None  # of the steps read since the last load, if somebody looks
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
        block_size = parts.scheduler.kv.block_size
        info = CoreInfo(parts.max_model_len, parts.num_blocks, block_size, gears=parts.gears)
        core = cls(
            parts.scheduler,
            parts.runner,
            info,
            overlap=config.args.async_scheduling,
            grammars=parts.grammars,
            uses_whole_cache=config.args.kv_cache_memory_bytes is not None,
        )
        if config.args.profiler_config is not None:
            core._profiler = StepProfiler(choose_profiler(config.args.profiler_config))
        return core

    def add(self, request: RequestInput) -> list[RequestUpdate]:
        """Queue a request; an update comes back at once if it is refused, but for what its grammar causes."""
        if request.params.is_constrained and self.grammars is not None:
            self._waiting_for_grammar[request.request_id] = (request, self.grammars.prepare(request))
            return []
        return self._queue(request)

    def _queue(self, request: RequestInput) -> list[RequestUpdate]:
        refusal = self.scheduler.add(request)
        return [] if refusal is None else [refusal]

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        request_ids = list(request_ids)
        gone = [each for each in request_ids if self._waiting_for_grammar.pop(each, None) is not None]
        ended = [RequestUpdate(request_id, finish_reason="abort") for request_id in gone]
        return ended + self.scheduler.abort(request_ids)

    def step(self) -> list[RequestUpdate]:
        """Launch what can be launched and read the oldest step; returns what that changed."""
        updates = self._queue_prepared() if self._waiting_for_grammar else []
        while self.scheduler.next_output_is_dropped:  # computed for requests that had ended, or were aborted since
            self._read()
        if self._thread is not None and not self._in_flight:
            release_team()  # this thread's, which loaded the model; the thread of the steps has its own
        while len(self._in_flight) < self._max_in_flight:
            plan = self.scheduler.schedule()
            if not plan.rows:
                break
            self._in_flight.append((plan, self._launch(plan)))
        if self._in_flight:
            updates = updates + self._read()
            if self._thread is not None and not self.scheduler.has_unfinished:
                self._thread.submit(release_team)  # whoever computes in this process now has the spinning to itself
        return updates

    def _queue_prepared(self) -> list[RequestUpdate]:
        """Let those in whose grammars have been compiled; returns what refuses the others."""
        if not self._in_flight and not self.scheduler.has_unfinished:
            wait([each for _, each in self._waiting_for_grammar.values()], GRAMMAR_WAIT_SECONDS, FIRST_COMPLETED)
        updates: list[RequestUpdate] = []
        for request_id, (request, prepared) in list(self._waiting_for_grammar.items()):
            if prepared.done():
                del self._waiting_for_grammar[request_id]
                error = prepared.exception()
                if error is None:
                    updates += self._queue(request)
                else:
                    kind = "invalid" if isinstance(error, ValueError) else "internal"
                    updates.append(RequestUpdate(request_id, finish_reason="error", error=str(error), error_kind=kind))
        return updates

    def _read(self) -> list[RequestUpdate]:
        plan, launched = self._in_flight.popleft()
        output = launched()
        if self._reports is not None:
            num_tokens = sum(plan.num_tokens)
            report = StepReport(len(plan.rows), plan.num_decode, num_tokens, output.gear, output.seconds)
            self._reports.append(report)
        return self.scheduler.update(plan, output)

    def _launch(self, plan: StepPlan) -> Callable[[], StepOutput]:
        """Start a step; the result waits for its output."""
        if self._thread is not None:
            return self._thread.submit(self.runner.execute, plan).result
        return partial(self.runner.read, self.runner.dispatch(plan))

    def prepare(self) -> bool:
        """With nothing to compute: a piece of what speeds up the next steps, some milliseconds; whether there was one.

        Brings in the memory of the blocks that the next step may be given, or of all where the cache's size was given.
        """
        kv = self.scheduler.kv
        if self._uses_whole_cache:
            return self._pages.bring(kv.pool.num_blocks)
        ahead = -(-self.scheduler.config.max_num_batched_tokens // kv.block_size)
        return self._pages.bring(min(kv.pool.highest_given + 1 + ahead, kv.pool.num_blocks))

    def bring_memory(self) -> None:
        """Bring in all of a cache whose size was given, before the first step: for processes that never wait idly."""
        if self._uses_whole_cache and self.runner.device.type == "cpu":
            start = time.monotonic()
            self._pages.bring_all()
            logger.info("memory of the KV cache brought in, in %.1f s", time.monotonic() - start)

    def close(self) -> None:
        """Wait for the steps in flight and stop everything in the background. Nothing may be called afterwards."""
        if self._thread is not None:
            self._thread.shutdown()
        self.runner.close()
        if self.grammars is not None:
            self.grammars.close()

    def profile(self, *, starts: bool) -> None:
        """Start to profile the steps, or stop and write the trace. Raises RuntimeError or OSError, and goes on."""
        if self._profiler is None:
            raise RuntimeError("profiling is off; start the server with --profiler-config")
        run = self._profiler.start if starts else self._profiler.stop
        if self._thread is None:
            run()
        else:
            self._thread.submit(run).result()  # a profiler sees the thread it was started in

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._waiting_for_grammar)

    def stats(self) -> SchedulerStats:
        stats = self.scheduler.stats()
        if not self._waiting_for_grammar:
            return stats
        num_tokens = sum(len(request.prompt_token_ids) for request, _ in self._waiting_for_grammar.values())
        return msgspec.structs.replace(
            stats,
            num_waiting=stats.num_waiting + len(self._waiting_for_grammar),
            num_waiting_tokens=stats.num_waiting_tokens + num_tokens,
        )

    def watch(self, wanted: bool) -> None:
        """From here on keep a report of every step for `take_load`, or stop doing so."""
        self._reports = [] if wanted else None

    def take_load(self) -> CoreLoad | None:
        """The load, and the steps since it was last taken; None while nobody looks."""
        if self._reports is None:
            return None
        reports, self._reports = self._reports, []
        pool = self.scheduler.kv.pool
        return CoreLoad(pool.num_pinned, pool.num_cached, reports)

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.kv.reset_prefix_cache()
