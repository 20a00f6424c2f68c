"""The figures of a run against numbers worked out by hand."""

from __future__ import annotations

import pytest

from omni_engine.server.bench.client import RequestResult
from omni_engine.server.bench.metrics import Distribution, measure


def result(start, ttft, itl, tokens, **fields):
    latency = ttft + sum(itl)
    return RequestResult(
        prompt_len=10, success=True, output_tokens=tokens, start_time=100 + start, ttft=ttft, itl=itl,
        latency=latency, **fields,
    )  # fmt: skip


# Ends at 0.4, 2.0 and 1.9 s; the last one's three tokens come in two chunks.
RESULTS = [
    result(0.0, 0.2, [0.1, 0.1], 3),
    RequestResult(prompt_len=999, error="HTTP 503", start_time=100.0, output_tokens=50),
    result(0.5, 1.5, [], 1),
    result(1.0, 0.4, [0.5], 3),
]


def figures(results=RESULTS, duration=4.0, **options):
    options.setdefault("count_tokens", lambda text: pytest.fail("the server has told the tokens"))
    return measure(results, duration, **options)


def test_totals_and_rates_are_of_completed_requests():
    metrics = figures()
    assert (metrics.completed, metrics.failed, metrics.total_input, metrics.total_output) == (3, 1, 30, 7)
    assert (metrics.request_throughput, metrics.output_throughput) == (0.75, 1.75)
    assert metrics.total_token_throughput == 9.25
    assert metrics.output_lens == [3, 0, 1, 3]


@pytest.mark.parametrize(
    ("name", "mean", "median", "std"),
    [
        ("ttft", 700, 400, 571.5476),  # 200, 1500, 400
        ("tpot", 175, 175, 75),  # 0.2 / 2, 0.5 / 2; one token has none
        ("itl", 700 / 3, 100, 188.5618),  # 100, 100, 500
        ("e2el", 2800 / 3, 900, 449.6913),  # 400, 1500, 900
    ],
)
def test_distributions_are_in_milliseconds(name, mean, median, std):
    distribution = figures().distributions[name]
    assert (distribution.mean, distribution.median) == (pytest.approx(mean), pytest.approx(median))
    assert distribution.std == pytest.approx(std, rel=1e-4)


def test_percentiles_are_interpolated():
    assert figures(percentiles=(50, 75)).distributions["ttft"].percentiles == pytest.approx({50: 400, 75: 950})
    assert Distribution.of([], (99,)) == Distribution(0, 0, 0, {99: 0})


@pytest.mark.parametrize(
    ("objectives", "good"),
    [
        ({"ttft": 400}, 2),  # 400.0 itself is within
        ({"ttft": 399}, 1),
        ({"tpot": 100}, 2),  # a single token counts as 0
        ({"e2el": 1500}, 3),
        ({"e2el": 1000, "tpot": 150}, 1),
    ],
)
def test_goodput_counts_requests_within_every_objective(objectives, good):
    exact = [result(0.0, 0.25, [0.0625, 0.0625], 3), result(0.5, 1.5, [], 1), result(1.0, 0.4, [0.5], 3)]
    assert figures(exact, goodput=objectives).request_goodput == good / 4.0


def test_there_is_no_goodput_without_objectives():
    assert figures().request_goodput is None


def test_peaks():
    # Chunks come at 0.2, 0.3, 0.4 | 1.4, 1.9 | 2.0.
    assert figures().max_output_tokens_per_s == 3
    assert figures().max_concurrent_requests == 2


def test_requests_that_follow_each_other_do_not_overlap():
    row = [result(start, 0.25, [0.25], 2) for start in (0.0, 0.5, 1.0)]
    assert figures(row).max_concurrent_requests == 1
    assert figures([*row, result(0.25, 0.5, [], 1)]).max_concurrent_requests == 2


def test_tokens_that_the_server_does_not_tell_are_counted():
    untold = result(0.0, 0.2, [0.1], None, generated_text="a b c")
    metrics = figures([untold], count_tokens=lambda text: len(text.split()))
    assert metrics.total_output == 3
    assert metrics.distributions["tpot"].mean == pytest.approx(50)


def test_when_all_has_failed_all_is_zero():
    metrics = figures([RESULTS[1]], goodput={"ttft": 1})
    assert (metrics.completed, metrics.failed, metrics.total_output, metrics.request_goodput) == (0, 1, 0, 0)
    assert (metrics.max_output_tokens_per_s, metrics.max_concurrent_requests) == (0, 0)
    assert metrics.distributions["ttft"].mean == 0
