"""`metrics` of a response: the times and drafts of one request (--enable-per-request-metrics)."""

from __future__ import annotations

import msgspec

from ..engine.outputs import RequestStats


class RequestMetrics(msgspec.Struct):
    """Times in milliseconds. The two about several tokens are null where there is only one; the counts of drafts are
    left out where there were none."""

    time_to_first_token_ms: float  # from the request's arrival in the core to its first token
    generation_time_ms: float  # from the first token to the last
    queue_time_ms: float  # from its arrival in the core to its first step
    mean_itl_ms: float | None  # between two tokens
    tokens_per_second: float | None  # while tokens were generated
    num_draft_tokens: int | msgspec.UnsetType = msgspec.UNSET  # drafted for the request and verified
    num_accepted_tokens: int | msgspec.UnsetType = msgspec.UNSET  # those of them that became its tokens


def request_metrics(stats: RequestStats | None, num_tokens: int) -> RequestMetrics | None:
    """Of a request with one sequence that generated `num_tokens`; None if it ended before its first token."""
    if stats is None or not stats.first_token_ts:
        return None
    generating = stats.last_token_ts - stats.first_token_ts
    several = num_tokens > 1 and generating > 0
    drafted = stats.num_draft_tokens > 0
    return RequestMetrics(
        time_to_first_token_ms=_milliseconds(stats.first_token_latency),
        generation_time_ms=_milliseconds(generating),
        queue_time_ms=_milliseconds(stats.scheduled_ts - stats.queued_ts),
        mean_itl_ms=_milliseconds(generating / (num_tokens - 1)) if several else None,
        tokens_per_second=round((num_tokens - 1) / generating, 3) if several else None,
        num_draft_tokens=stats.num_draft_tokens if drafted else msgspec.UNSET,
        num_accepted_tokens=stats.num_accepted_tokens if drafted else msgspec.UNSET,
    )


def _milliseconds(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 3)
