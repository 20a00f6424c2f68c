"""The printed block and the JSON result have vLLM's labels and keys, in its order."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from omni_engine.server.bench.client import RequestResult
from omni_engine.server.bench.metrics import measure
from omni_engine.server.bench.report import (
    RunLabels,
    error_lines,
    printed_block,
    result_object,
    result_path,
    save_result,
)
from omni_engine.server.bench.traffic import TrafficPattern

RESULTS = [
    RequestResult(10, True, "", 3, 5.0, 0.2, [0.1, 0.1], 0.4, 0.01, "a b c"),
    RequestResult(7, error="HTTP 503: no"),
]
SHOWN = ("ttft", "tpot", "itl")
DATE = datetime(2026, 3, 4, 5, 6, 7)


def figures(**options):
    return measure(RESULTS, 2.0, count_tokens=len, **options)


def run(pattern=None, **fields):
    fields = {"backend": "openai", "model_id": "owner/tiny", "tokenizer_id": "t", "num_prompts": 2, **fields}
    return RunLabels(pattern=pattern or TrafficPattern(), date=DATE, **fields)


def labels(block):
    return [line.split(":")[0] + ":" for line in block.splitlines() if ":" in line]


def test_the_block_as_a_whole():
    assert printed_block(figures(), run(), SHOWN).splitlines() == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     1         ",
        "Failed requests:                         1         ",
        "Benchmark duration (s):                  2.00      ",
        "Total input tokens:                      10        ",
        "Total generated tokens:                  3         ",
        "Request throughput (req/s):              0.50      ",
        "Output token throughput (tok/s):         1.50      ",
        "Peak output token throughput (tok/s):    3.00      ",
        "Peak concurrent requests:                1.00      ",
        "Total token throughput (tok/s):          6.50      ",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          200.00    ",
        "Median TTFT (ms):                        200.00    ",
        "P99 TTFT (ms):                           200.00    ",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          100.00    ",
        "Median TPOT (ms):                        100.00    ",
        "P99 TPOT (ms):                           100.00    ",
        "---------------Inter-token Latency----------------",
        "Mean ITL (ms):                           100.00    ",
        "Median ITL (ms):                         100.00    ",
        "P99 ITL (ms):                            100.00    ",
        "==================================================",
    ]


def test_lines_that_depend_on_flags():
    metrics = figures(goodput={"ttft": 1000}, percentiles=(50, 99.9))
    block = printed_block(metrics, run(TrafficPattern(2.5), max_concurrency=4), ("e2el",))
    assert labels(block) == [
        "Successful requests:", "Failed requests:", "Maximum request concurrency:", "Request rate configured (RPS):",
        "Benchmark duration (s):", "Total input tokens:", "Total generated tokens:", "Request throughput (req/s):",
        "Request goodput (req/s):", "Output token throughput (tok/s):", "Peak output token throughput (tok/s):",
        "Peak concurrent requests:", "Total token throughput (tok/s):",
        "Mean E2EL (ms):", "Median E2EL (ms):", "P50 E2EL (ms):", "P99.9 E2EL (ms):",
    ]  # fmt: skip
    assert "Request rate configured (RPS):           2.50" in block
    assert "Maximum request concurrency:             4 " in block
    assert "----------------End-to-end Latency----------------" in block


def test_the_result_has_vllms_keys_in_its_order():
    result = result_object(figures(), RESULTS, run(metadata={"tp": "1"}), SHOWN, detailed=False)
    assert list(result) == [
        "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "tp", "request_rate",
        "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens",
        "total_output_tokens", "request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
        "latencies", "queue_times", "max_output_tokens_per_s", "max_concurrent_requests", "rtfx",
        "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms",
        "mean_tpot_ms", "median_tpot_ms", "std_tpot_ms", "p99_tpot_ms",
        "mean_itl_ms", "median_itl_ms", "std_itl_ms", "p99_itl_ms",
    ]  # fmt: skip
    assert (result["date"], result["request_rate"], result["label"]) == ("20260304-050607", "inf", None)
    assert (result["latencies"], result["queue_times"]) == ([0.4, 0.0], [0.01, 0.0])


def test_details_have_an_entry_per_request():
    result = result_object(figures(), RESULTS, run(), SHOWN, detailed=True)
    assert {name: result[name] for name in ("input_lens", "output_lens", "ttfts", "itls", "start_times")} == {
        "input_lens": [10, 7], "output_lens": [3, 0], "ttfts": [0.2, 0.0], "itls": [[0.1, 0.1], []],
        "start_times": [5.0, 0.0],
    }  # fmt: skip
    assert (result["generated_texts"], result["errors"]) == (["a b c", ""], ["", "HTTP 503: no"])


def test_the_result_is_strict_json():
    metrics = measure([RESULTS[1]], 2.0, count_tokens=len)
    pattern = TrafficPattern(float("inf"), float("inf"))
    result = result_object(metrics, RESULTS[1:], run(pattern), SHOWN, detailed=True)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_ramps_have_their_keys():
    pattern = TrafficPattern(float("inf"), 1.0, "linear", 1.0, 9.0)
    result = result_object(figures(), RESULTS, run(pattern), SHOWN, detailed=False)
    keys = ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps")
    assert [result[key] for key in keys] == ["linear", 1.0, 9.0]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "openai-infqps-tiny-20260304-050607.json"),
        ({"label": "mine", "max_concurrency": 8}, "mine-infqps-concurrency8-tiny-20260304-050607.json"),
        ({"pattern": TrafficPattern(2.0)}, "openai-2.0qps-tiny-20260304-050607.json"),
        (
            {"pattern": TrafficPattern(float("inf"), 1.0, "linear", 1.0, 9.0)},
            "openai-ramp-up-linear-1qps-9qps-tiny-20260304-050607.json",
        ),
    ],
)
def test_the_file_has_vllms_name(fields, name):
    assert result_path(run(**fields), "results") == Path("results") / name
    assert result_path(run(**fields), None, "own.json") == Path("own.json")


def test_saving_replaces_or_appends(tmp_path):
    path = tmp_path / "new" / "result.json"
    save_result(path, {"a": 1}, append=False)
    save_result(path, {"a": 2}, append=False)
    assert json.loads(path.read_text()) == {"a": 2}
    path.write_text('{"a": 2}')  # as another program may leave it
    save_result(path, {"a": 3}, append=True)
    save_result(path, {"a": 4}, append=True)
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [2, 3, 4]


def test_errors_are_counted():
    failed = [RequestResult(1, error="rare"), *[RequestResult(1, error="often")] * 3, RESULTS[0]]
    assert error_lines(failed) == ["3 x often", "1 x rare"]
