"""How busy the engine is, told only while somebody looks: what the core reports of its steps, and `LoadMeter`, which
sums it up in the front."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import msgspec

from ..scheduler.draft_stats import DraftStats
from ..scheduler.request import RequestUpdate
from ..scheduler.scheduler import SchedulerStats

MAX_FIRST_TOKENS = 200  # times to a first token that one sample tells one by one


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """One step that has been read."""

    num_requests: int
    num_decode: int  # of these, those that decoded; the others computed pieces of their prompts
    num_tokens: int  # computed: of prompts, newest tokens and drafts
    gear: int  # requests that the graph of the step has room for; 0: the step ran without one
    seconds: float  # on the device


class CoreLoad(msgspec.Struct, frozen=True, array_like=True):
    """What the core adds to its updates while it is watched."""

    num_blocks_pinned: int  # KV blocks that requests hold
    num_blocks_cached: int  # KV blocks that nobody holds and that the prefix cache may still find
    steps: list[StepReport]  # since the last report


class LoadSample(msgspec.Struct, frozen=True):
    """The load at one moment, and what has happened in the `seconds` before it. Times are in seconds."""

    seconds: float
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    num_blocks_pinned: int
    num_blocks_cached: int
    num_prompt_tokens: int  # of requests that got their first token, cached ones included
    num_generation_tokens: int
    num_prefix_queries: int  # prompt tokens looked up in the prefix cache
    num_prefix_hits: int  # of these, found
    num_preemptions: int
    first_token_seconds: list[float]  # of requests that got their first token: since they came to the core
    token_seconds: float | None  # mean time between two tokens of a request
    num_steps: int
    step_seconds: float  # of all these steps
    largest_batch: int  # most requests of one of these steps
    steps_by_gear: dict[int, int]  # 0: without a graph
    drafts: DraftStats | None  # None where there is no speculation


class LoadMeter:
    """Takes in the core's updates, and makes a sample of what has come since the last one."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._stats: SchedulerStats | None = None
        self._sampled_stats: SchedulerStats | None = None  # where the last sample's counters end
        self._load = CoreLoad(0, 0, [])
        self._last_token: dict[str, float] = {}  # by the core's id of a sequence
        self._begin_sample()

    def _begin_sample(self) -> None:
        self._num_prompt_tokens = self._num_generation_tokens = 0
        self._first_token_seconds: list[float] = []
        self._waited_seconds = 0.0  # between tokens
        self._num_waits = 0
        self._num_steps = self._largest_batch = 0
        self._step_seconds = 0.0
        self._by_gear: Counter[int] = Counter()

    def take(
        self,
        updates: Iterable[RequestUpdate],
        stats: SchedulerStats,
        load: CoreLoad | None,
        num_prompt_tokens: int,
        num_generation_tokens: int,
        now: float,
    ) -> None:
        """One message of the core, read at `now` (monotonic seconds), and the tokens that the front counted in it."""
        if self._stats is None:
            self._sampled_stats = stats  # what was before nobody has seen
        self._stats = stats
        self._num_prompt_tokens += num_prompt_tokens
        self._num_generation_tokens += num_generation_tokens
        for update in updates:
            self._take_times(update, now)
        if load is None:
            return
        self._load = load
        for step in load.steps:
            self._num_steps += 1
            self._step_seconds += step.seconds
            self._largest_batch = max(self._largest_batch, step.num_requests)
            self._by_gear[step.gear] += 1

    def _take_times(self, update: RequestUpdate, now: float) -> None:
        num_new = len(update.new_token_ids)
        if num_new:
            last = self._last_token.get(update.request_id)
            if update.queued_time:  # told with the first token
                if len(self._first_token_seconds) < MAX_FIRST_TOKENS:
                    self._first_token_seconds.append(now - update.queued_time)
                self._num_waits += num_new - 1  # of drafts that came with it, at once
            elif last is not None:
                self._waited_seconds += now - last
                self._num_waits += num_new
            self._last_token[update.request_id] = now
        if update.finish_reason is not None:
            self._last_token.pop(update.request_id, None)

    def core_lost(self) -> None:
        """Nothing runs any more, and a new core counts from 0."""
        self._stats = self._sampled_stats = None
        self._load = CoreLoad(0, 0, [])
        self._last_token.clear()

    def sample(self, now: float) -> LoadSample:
        """The load at `now`; the next sample begins here."""
        stats, before = self._stats, self._sampled_stats

        def grown(name: str) -> int:
            return 0 if stats is None or before is None else getattr(stats, name) - getattr(before, name)

        sample = LoadSample(
            seconds=now - self._since,
            num_running=0 if stats is None else stats.num_running,
            num_waiting=0 if stats is None else stats.num_waiting,
            num_waiting_tokens=0 if stats is None else stats.num_waiting_tokens,
            num_blocks_pinned=self._load.num_blocks_pinned,
            num_blocks_cached=self._load.num_blocks_cached,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_prefix_queries=grown("prefix_cache_queries"),
            num_prefix_hits=grown("prefix_cache_hits"),
            num_preemptions=grown("num_preemptions"),
            first_token_seconds=self._first_token_seconds,
            token_seconds=self._waited_seconds / self._num_waits if self._num_waits else None,
            num_steps=self._num_steps,
            step_seconds=self._step_seconds,
            largest_batch=self._largest_batch,
            steps_by_gear=dict(self._by_gear),
            drafts=None if stats is None or stats.drafts is None else stats.drafts.since(before and before.drafts),
        )
        self._since, self._sampled_stats = now, stats
        self._begin_sample()
        return sample
