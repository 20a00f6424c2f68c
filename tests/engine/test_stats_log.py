"""The periodic log line: rates over the time since the last one, and silence at rest."""

import pytest

from omni_engine.engine.stats_log import StatsLog
from omni_engine.scheduler.scheduler import SchedulerStats


def stats(running=0, waiting=0, usage=0.0, queries=0, hits=0):
    return SchedulerStats(running, waiting, 0, usage, queries, hits, 0)


def test_rates_are_per_second_since_the_last_line():
    log = StatsLog(100.0)
    log.count(stats(2, 1, 0.25, 200, 50), prompt_tokens=30, generation_tokens=100)
    log.count(stats(2, 1, 0.25, 200, 50), prompt_tokens=20, generation_tokens=100)
    assert log.line(110.0) == (
        "Engine 000: Avg prompt throughput: 5.0 tokens/s, Avg generation throughput: 20.0 tokens/s, Running: 2 reqs, "
        "Waiting: 1 reqs, GPU KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )
    log.count(stats(2), prompt_tokens=0, generation_tokens=10)
    assert "generation throughput: 2.0 tokens/s" in (log.line(115.0) or "")


def test_an_idle_engine_says_so_once():
    log = StatsLog(0.0)
    assert log.line(10.0) is None
    log.count(stats(), 5, 5)
    assert log.line(20.0) is not None
    assert "Running: 0 reqs" in (log.line(30.0) or "")
    assert log.line(40.0) is None


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_an_interval_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("VLLM_LOG_STATS_INTERVAL", text)
    with pytest.raises(ValueError, match="VLLM_LOG_STATS_INTERVAL"):
        StatsLog(0.0)
