"""What the benchmarks tell of speculation: read from a server's counters, under vLLM's labels and keys."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from omni_engine.engine.metrics import EngineMetrics
from omni_engine.scheduler.draft_stats import DraftStats
from omni_engine.scheduler.scheduler import SchedulerStats
from omni_engine.server.bench.acceptance import acceptance_fields, acceptance_lines, read_counters

# As vLLM answers, of two engines behind one port. The model's name is made to mislead.
SCRAPE = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m num_draft_tokens"} 3.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m num_draft_tokens"} 2.0
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="m num_draft_tokens"} 1.75e+09
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m num_draft_tokens"} 9.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m num_draft_tokens"} 9.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m num_draft_tokens"} 5.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m num_draft_tokens"} 4.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m num_draft_tokens",position="0"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m num_draft_tokens",position="1"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m num_draft_tokens",position="0"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m num_draft_tokens",position="1"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m num_draft_tokens",position="2"} 1.0
"""


def test_a_vllm_servers_counters_are_summed_over_its_engines():
    assert read_counters(SCRAPE) == DraftStats(5, 18, 9, [5, 3, 1])


def test_our_own_metrics_are_read_back():
    registry = CollectorRegistry()
    metrics = EngineMetrics(registry, "m", 100, {}, num_drafts=2)
    assert read_counters(generate_latest(registry).decode()) == DraftStats(0, 0, 0, [0, 0])
    metrics.take([], SchedulerStats(0, 0, 0, 0.0, 0, 0, 0, DraftStats(7, 14, 9, [6, 3])))
    assert read_counters(generate_latest(registry).decode()) == DraftStats(7, 14, 9, [6, 3])


def test_a_server_without_speculation_has_no_counters():
    registry = CollectorRegistry()
    EngineMetrics(registry, "m", 100, {})
    assert read_counters(generate_latest(registry).decode()) is None
    with pytest.raises(ValueError):
        read_counters("<html>no metrics</html>")


def test_labels_and_keys_are_vllms():
    drafts = DraftStats(5, 18, 9, [5, 3, 1])
    assert acceptance_lines(drafts) == [
        "---------------Speculative Decoding---------------",
        "Acceptance rate (%):                     50.00     ",
        "Acceptance length:                       2.80      ",
        "Drafts:                                  5         ",
        "Draft tokens:                            18        ",
        "Accepted tokens:                         9         ",
        "Per-position acceptance (%):",
        "  Position 0:                            100.00    ",
        "  Position 1:                            60.00     ",
        "  Position 2:                            20.00     ",
    ]
    assert acceptance_fields(drafts) == {
        "spec_decode_acceptance_rate": 50.0,
        "spec_decode_acceptance_length": 2.8,
        "spec_decode_num_drafts": 5,
        "spec_decode_draft_tokens": 18,
        "spec_decode_accepted_tokens": 9,
        "spec_decode_per_position_acceptance_rates": [1.0, 0.6, 0.2],
    }
    assert acceptance_lines(None) == [] and acceptance_fields(None) == {}
