"""The periodic log line: rates over the time since the last one, and silence at rest."""

import pytest

from omni_engine.engine.stats_log import StatsLog
from omni_engine.scheduler.draft_stats import DraftStats
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


def with_drafts(*counts, positions):
    return SchedulerStats(0, 0, 0, 0.0, 0, 0, 0, DraftStats(*counts, num_accepted_per_position=positions))


def test_the_line_about_drafts_is_one_that_vllm_has_printed():
    log = StatsLog(100.0)
    log.count(with_drafts(203, 609, 206, positions=[122, 58, 26]), 5, 5)
    assert log.draft_line(110.0) == (  # published with a server's output: 203 drafts of three tokens in ten seconds
        "SpecDecoding metrics: Mean acceptance length: 2.01, Accepted throughput: 20.60 tokens/s, Drafted throughput: "
        "60.90 tokens/s, Accepted: 206 tokens, Drafted: 609 tokens, Per-position acceptance rate: 0.601, 0.286, 0.128, "
        "Avg Draft acceptance rate: 33.8%"
    )


def test_each_line_about_drafts_is_of_the_time_since_the_last():
    log = StatsLog(0.0)
    log.count(with_drafts(10, 30, 12, positions=[7, 4, 1]), 5, 5)
    assert "Accepted: 12 tokens, Drafted: 30 tokens" in (log.draft_line(10.0) or "")
    assert log.draft_line(20.0) is None  # no drafts, no line
    log.count(with_drafts(14, 42, 18, positions=[10, 6, 2]), 5, 5)
    line = log.draft_line(30.0) or ""
    assert "Mean acceptance length: 2.50, Accepted throughput: 0.60 tokens/s, Drafted throughput: 1.20" in line
    assert "Per-position acceptance rate: 0.750, 0.500, 0.250, Avg Draft acceptance rate: 50.0%" in line
    log.count(with_drafts(1, 3, 3, positions=[1, 1, 1]), 5, 5)  # of a core that was started anew
    assert "Accepted: 3 tokens, Drafted: 3 tokens" in (log.draft_line(40.0) or "")


def test_without_speculation_there_is_no_line_about_drafts(caplog):
    log = StatsLog(0.0)
    log.count(stats(1), 5, 5)
    assert log.draft_line(10.0) is None
    with caplog.at_level("INFO", logger="omni_engine.engine.stats_log"):
        log.write()
    assert [record.message[:10] for record in caplog.records] == ["Engine 000"]
    log.count(with_drafts(1, 1, 1, positions=[1]), 5, 5)
    with caplog.at_level("INFO", logger="omni_engine.engine.stats_log"):
        log.write()
    assert [record.message[:10] for record in caplog.records] == ["Engine 000"] * 2 + ["SpecDecodi"]
