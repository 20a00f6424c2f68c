"""`EngineMetrics`: what a scrape shows after requests that came, ran, ended or were left."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from omni_engine.engine.metrics import EngineMetrics, token_buckets
from omni_engine.scheduler.draft_stats import DraftStats
from omni_engine.scheduler.request import RequestInput, RequestUpdate
from omni_engine.scheduler.sampling_params import SamplingParams
from omni_engine.scheduler.scheduler import SchedulerStats

IDLE = SchedulerStats(0, 0, 0, 0.0, 0, 0, 0)
BUSY = SchedulerStats(3, 2, 50, 0.25, 100, 40, 1)


class Scrape:
    """One engine's metrics and what a scrape of them says."""

    def __init__(self, num_drafts=0):
        self.registry = CollectorRegistry()
        self.metrics = EngineMetrics(self.registry, "m", 1000, {"block_size": 16, "num_gpu_blocks": 9}, num_drafts)

    def value(self, name, **labels):
        return self.registry.get_sample_value(f"vllm:{name}", {"model_name": "m", "engine": "0", **labels})

    def finished(self):
        reasons = ("stop", "length", "abort", "error")
        return [self.value("request_success_total", finished_reason=reason) for reason in reasons]

    def add(self, *core_ids, num_prompt=10, max_tokens=4):
        params = SamplingParams(max_tokens=max_tokens)
        self.metrics.add([RequestInput(core_id, [5] * num_prompt, params, arrival_time=1.0) for core_id in core_ids])

    def step(self, *updates, stats=IDLE):
        self.metrics.take(updates, stats)

    def run(self, core_id, num_tokens, reason="length"):
        self.step(RequestUpdate(core_id, [7], num_cached_tokens=2, queued_time=1.0, scheduled_time=1.5))
        for _ in range(num_tokens - 2):
            self.step(RequestUpdate(core_id, [7]))
        self.step(RequestUpdate(core_id, [7], finish_reason=reason))


@pytest.fixture
def scrape():
    return Scrape()


def test_counts_are_exact(scrape):
    for number in range(3):
        scrape.add(str(number))
        scrape.run(str(number), 4)
    assert scrape.value("time_to_first_token_seconds_count") == 3
    assert scrape.value("inter_token_latency_seconds_count") == 3 * 3
    assert scrape.value("request_prompt_tokens_sum") == scrape.value("prompt_tokens_total") == 3 * 10
    assert scrape.value("request_generation_tokens_sum") == scrape.value("generation_tokens_total") == 3 * 4
    assert scrape.value("iteration_tokens_total_sum") == 3 * (10 + 4)
    assert scrape.value("iteration_tokens_total_count") == 3 * 4
    assert scrape.value("prompt_tokens_cached_total") == 3 * 2
    assert scrape.value("prompt_tokens_by_source_total", source="local_compute") == 3 * 8
    assert scrape.value("request_prefill_kv_computed_tokens_sum") == 3 * 8
    assert scrape.value("request_params_max_tokens_sum") == 3 * 4
    assert scrape.finished() == [0, 3, 0, 0]
    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time", "request_prefill_time",
                 "request_decode_time", "request_time_per_output_token"):  # fmt: skip
        assert scrape.value(f"{name}_seconds_count") == 3, name
    assert scrape.value("request_queue_time_seconds_sum") == 3 * 0.5


def test_tokens_that_come_together_count_one_by_one(scrape):
    scrape.add("a")
    scrape.step(RequestUpdate("a", [7, 7, 7]))
    scrape.step(RequestUpdate("a", [7, 7], finish_reason="stop"))
    assert scrape.value("time_to_first_token_seconds_count") == 1
    assert scrape.value("inter_token_latency_seconds_count") == 4
    assert scrape.value("iteration_tokens_total_count") == 2


def test_the_sequences_of_a_request_count_each_and_n_once(scrape):
    scrape.add("a", "b", "c")
    for core_id, num_tokens in (("a", 2), ("b", 4), ("c", 3)):
        scrape.run(core_id, num_tokens, "stop")
    assert scrape.finished() == [3, 0, 0, 0]
    assert (scrape.value("request_params_n_count"), scrape.value("request_params_n_sum")) == (1, 3)
    assert scrape.value("request_max_num_generation_tokens_sum") == 4
    assert scrape.value("request_generation_tokens_sum") == 9


def test_a_sequence_that_its_caller_left_is_an_abort_and_in_no_histogram(scrape):
    scrape.add("a")
    scrape.step(RequestUpdate("a", [7]))
    scrape.metrics.end("a", "abort")
    scrape.metrics.end("a", "abort")
    scrape.step(RequestUpdate("a", [7]), RequestUpdate("a", finish_reason="abort"))
    assert scrape.finished() == [0, 0, 1, 0]
    assert scrape.value("generation_tokens_total") == 1
    assert scrape.value("request_generation_tokens_count") == 0


def test_a_failed_sequence_fails_its_whole_request_once(scrape):
    scrape.add("a", "b")
    scrape.step(RequestUpdate("a", finish_reason="error", error_kind="internal"))
    scrape.metrics.end("b", "stop")
    assert scrape.finished() == [0, 0, 0, 2]


def test_a_full_queue_is_an_admission_rejection(scrape):
    scrape.add("a")
    scrape.step(RequestUpdate("a", finish_reason="error", error_kind="queue_full"))
    labels = {"model_name": "m", "reason": "queue_full"}
    assert scrape.registry.get_sample_value("vllm:admission_rejections_total", labels) == 1


def test_gauges_follow_the_scheduler_and_counters_grow_by_what_is_new(scrape):
    scrape.step(stats=BUSY)
    scrape.step(stats=BUSY)
    assert (scrape.value("num_requests_running"), scrape.value("num_requests_waiting")) == (3, 2)
    assert scrape.value("num_requests_waiting_by_reason", reason="capacity") == 2
    assert scrape.value("kv_cache_usage_perc") == 0.25
    assert scrape.value("prefix_cache_queries_total") == 100
    assert scrape.value("prefix_cache_hits_total") == 40
    assert scrape.value("num_preemptions_total") == 1
    assert scrape.value("iteration_tokens_total_count") == 0


def test_a_dead_engine_runs_nothing(scrape):
    scrape.add("a")
    scrape.step(stats=BUSY)
    scrape.metrics.core_lost()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert scrape.value(name) == 0
    assert scrape.finished() == [0, 0, 0, 1]


def test_counters_go_on_when_a_new_core_counts_from_zero(scrape):
    scrape.step(stats=BUSY)
    scrape.metrics.core_lost()
    scrape.step(stats=BUSY)
    assert scrape.value("prefix_cache_queries_total") == 200


def drafts(*counts, positions):
    return SchedulerStats(0, 0, 0, 0.0, 0, 0, 0, DraftStats(*counts, num_accepted_per_position=positions))


def draft_values(scrape, num_positions=2):
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    per_position = "spec_decode_num_accepted_tokens_per_pos_total"
    return [scrape.value(f"spec_decode_{name}_total") for name in names] + [
        scrape.value(per_position, position=str(position)) for position in range(num_positions)
    ]


def test_drafts_are_counted_from_the_first_scrape_on():
    scrape = Scrape(num_drafts=2)
    assert draft_values(scrape) == [0, 0, 0, 0, 0]
    scrape.step(stats=drafts(3, 6, 4, positions=[3, 1]))
    scrape.step(stats=drafts(3, 6, 4, positions=[3, 1]))
    scrape.step(stats=drafts(5, 10, 5, positions=[4, 1]))
    assert draft_values(scrape) == [5, 10, 5, 4, 1]
    scrape.metrics.core_lost()
    scrape.step(stats=drafts(7, 14, 9, positions=[6, 3]))
    assert draft_values(scrape) == [12, 24, 14, 10, 4]


def test_without_speculation_there_are_no_metrics_about_drafts(scrape):
    scrape.step(stats=BUSY)
    assert draft_values(scrape) == [None] * 5
    assert not any("spec_decode" in family.name for family in scrape.registry.collect())


def test_the_cache_is_told_in_labels(scrape):
    assert scrape.value("cache_config_info", block_size="16", num_gpu_blocks="9") == 1


@pytest.mark.parametrize(
    ("longest", "bounds"),
    [(1, (1,)), (192, (1, 2, 5, 10, 20, 50, 100)), (1000, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))],
)
def test_token_buckets_are_a_1_2_5_series_up_to_the_context(longest, bounds):
    assert token_buckets(longest) == bounds
