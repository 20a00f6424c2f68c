"""The periodic log lines about throughput, queues, cache and drafts, in the words that people grep for."""

from __future__ import annotations

import logging
import os
import time

from ..scheduler.draft_stats import DraftStats
from ..scheduler.scheduler import SchedulerStats

logger = logging.getLogger(__name__)
DEFAULT_INTERVAL_SECONDS = 10.0


class StatsLog:
    """Counts tokens and writes a line at most every VLLM_LOG_STATS_INTERVAL seconds (10 by default), and one more about
    drafts if there were any.

    An idle engine writes one last line, which shows that it has come to rest, and then nothing.
    """

    def __init__(self, now: float) -> None:
        text = os.environ.get("VLLM_LOG_STATS_INTERVAL", str(DEFAULT_INTERVAL_SECONDS))
        try:
            self.interval = float(text)
        except ValueError as error:
            raise ValueError(f"VLLM_LOG_STATS_INTERVAL must be a number of seconds: {text}") from error
        if not self.interval > 0:
            raise ValueError(f"VLLM_LOG_STATS_INTERVAL must be above 0; --disable-log-stats turns it off: {text}")
        self._since = now
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._stats: SchedulerStats | None = None
        self._was_idle = True
        self._drafts_since = now
        self._told_drafts: DraftStats | None = None

    def count(self, stats: SchedulerStats, prompt_tokens: int, generation_tokens: int) -> None:
        """Take in one step: the prompt tokens of requests that got their first token, and all new tokens."""
        self._stats = stats
        self._prompt_tokens += prompt_tokens
        self._generation_tokens += generation_tokens

    def line(self, now: float) -> str | None:
        """The line for the time since the last one; None where there is nothing to say."""
        stats, elapsed = self._stats, now - self._since
        if stats is None or elapsed <= 0:
            return None
        idle = not (self._prompt_tokens or self._generation_tokens or stats.num_running or stats.num_waiting)
        say = not (idle and self._was_idle)
        self._was_idle = idle
        prompt_rate, generation_rate = self._prompt_tokens / elapsed, self._generation_tokens / elapsed
        self._since, self._prompt_tokens, self._generation_tokens = now, 0, 0
        if not say:
            return None
        hit_rate = stats.prefix_cache_hits / stats.prefix_cache_queries if stats.prefix_cache_queries else 0.0
        return (
            f"Engine 000: Avg prompt throughput: {prompt_rate:.1f} tokens/s, "
            f"Avg generation throughput: {generation_rate:.1f} tokens/s, "
            f"Running: {stats.num_running} reqs, Waiting: {stats.num_waiting} reqs, "
            f"GPU KV cache usage: {stats.kv_cache_usage:.1%}, Prefix cache hit rate: {hit_rate:.1%}"
        )

    def draft_line(self, now: float) -> str | None:
        """The line about the drafts that were verified since the last one; None where there were none."""
        drafts = None if self._stats is None else self._stats.drafts
        elapsed = now - self._drafts_since
        if drafts is None or elapsed <= 0:
            return None
        new = drafts.since(self._told_drafts)
        self._told_drafts, self._drafts_since = drafts, now
        if not new.num_drafts:
            return None
        rates = ", ".join(f"{rate:.3f}" for rate in new.acceptance_per_position)
        return (
            f"SpecDecoding metrics: Mean acceptance length: {new.acceptance_length:.2f}, "
            f"Accepted throughput: {new.num_accepted_tokens / elapsed:.2f} tokens/s, "
            f"Drafted throughput: {new.num_draft_tokens / elapsed:.2f} tokens/s, "
            f"Accepted: {new.num_accepted_tokens} tokens, Drafted: {new.num_draft_tokens} tokens, "
            f"Per-position acceptance rate: {rates}, "
            f"Avg Draft acceptance rate: {100 * new.acceptance_rate:.1f}%"
        )

    def write(self) -> None:
        now = time.monotonic()
        for text in (self.line(now), self.draft_line(now)):
            if text is not None:
                logger.info(text)
