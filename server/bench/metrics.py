"""From the results of requests to the figures of a benchmark, each defined as vLLM defines it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .client import RequestResult

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Distribution:
    """Statistics of one metric, in milliseconds; all are 0 without samples. `std` is the population's."""

    mean: float
    median: float
    std: float
    percentiles: dict[float, float]

    @classmethod
    def of(cls, seconds: Sequence[float], percentiles: Sequence[float]) -> Distribution:
        values = np.array(seconds if len(seconds) else [0.0]) * 1000
        return cls(
            float(np.mean(values)),
            float(np.median(values)),
            float(np.std(values)),
            {percentile: float(np.percentile(values, percentile)) for percentile in percentiles},
        )


@dataclass(frozen=True)
class ServeMetrics:
    """The figures of a run. Tokens and times are of completed requests only; rates are per second of `duration`."""

    duration: float
    completed: int
    failed: int
    total_input: int
    total_output: int
    request_goodput: float | None  # None without objectives
    max_output_tokens_per_s: float
    max_concurrent_requests: int
    distributions: dict[str, Distribution]  # by METRICS
    output_lens: list[int]  # of every request, 0 for a failed one

    @property
    def request_throughput(self) -> float:
        return self.completed / self.duration

    @property
    def output_throughput(self) -> float:
        return self.total_output / self.duration

    @property
    def total_token_throughput(self) -> float:
        return (self.total_input + self.total_output) / self.duration


def measure(
    results: Sequence[RequestResult],
    duration: float,
    *,
    count_tokens: Callable[[str], int],
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> ServeMetrics:
    """The figures of `results`, which took `duration` seconds together.

    `goodput` holds objectives in milliseconds by metric. `count_tokens` counts the tokens of a generated text, for
    servers that do not tell them. TPOT is (latency - TTFT) / (tokens - 1), for requests of at least two tokens; for
    goodput it is 0 where there is only one.
    """
    done = [result for result in results if result.success]
    lens = {id(result): result.output_tokens or count_tokens(result.generated_text) for result in done}
    tpots = [_time_per_token(result, lens[id(result)]) for result in done]
    samples: dict[str, list[float]] = {
        "ttft": [result.ttft for result in done],
        "tpot": [tpot for result, tpot in zip(done, tpots, strict=True) if lens[id(result)] > 1],
        "itl": [gap for result in done for gap in result.itl],
        "e2el": [result.latency for result in done],
    }
    request_goodput = None
    if goodput:
        times = {"ttft": samples["ttft"], "tpot": tpots, "e2el": samples["e2el"]}
        good = sum(
            all(times[name][index] * 1000 <= limit for name, limit in goodput.items()) for index in range(len(done))
        )
        request_goodput = good / duration
    return ServeMetrics(
        duration=duration,
        completed=len(done),
        failed=len(results) - len(done),
        total_input=sum(result.prompt_len for result in done),
        total_output=sum(lens.values()),
        request_goodput=request_goodput,
        max_output_tokens_per_s=_peak_output_rate(done),
        max_concurrent_requests=_peak_concurrency(done),
        distributions={name: Distribution.of(values, percentiles) for name, values in samples.items()},
        output_lens=[lens.get(id(result), 0) for result in results],
    )


def _time_per_token(result: RequestResult, output_len: int) -> float:
    return (result.latency - result.ttft) / (output_len - 1) if output_len > 1 else 0.0


def _peak_output_rate(done: Sequence[RequestResult]) -> float:
    """Most chunks received in one of the seconds counted from the first request; a chunk counts as one token."""
    if not done:
        return 0.0
    start = min(result.start_time for result in done)
    seconds = [
        np.floor(result.start_time - start + result.ttft + np.cumsum([0.0, *result.itl])).astype(int) for result in done
    ]
    return float(np.bincount(np.concatenate(seconds)).max())


def _peak_concurrency(done: Sequence[RequestResult]) -> int:
    """Most requests open at one moment; one that ends as another begins does not overlap it."""
    events = sorted(
        event for result in done for event in ((result.start_time, 1), (result.start_time + result.latency, -1))
    )
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most
