"""Arrival times: their mean, their burstiness, and how they ramp up."""

from __future__ import annotations

import numpy as np
import pytest

from omni_engine.server.bench.traffic import TrafficPattern

NUMBER = 20_000


def gaps(pattern, seed=0, number=NUMBER):
    times = pattern.arrival_times(number, np.random.default_rng(seed))
    return np.diff(times, prepend=0.0)


def variation(values):
    return values.std() / values.mean()


def test_an_infinite_rate_sends_all_at_once():
    assert TrafficPattern().arrival_times(4, np.random.default_rng(0)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 5.0])
def test_the_mean_rate_is_exact_and_the_gaps_are_gamma(burstiness):
    values = gaps(TrafficPattern(8.0, burstiness))
    assert values.sum() == pytest.approx(NUMBER / 8)
    assert (values >= 0).all()
    assert variation(values) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_arrivals_vary_by_their_number():
    """In a Poisson process the arrivals of equal times have a variance as large as their mean; burstier ones more."""
    counts = []
    for burstiness in (1.0, 0.25):
        times = TrafficPattern(10.0, burstiness).arrival_times(NUMBER, np.random.default_rng(1))
        per_second = np.bincount(times.astype(int))[:-1]
        counts.append(per_second.var() / per_second.mean())
    assert counts[0] == pytest.approx(1, abs=0.15)
    assert counts[1] > 2.5


def test_a_metronome():
    assert gaps(TrafficPattern(4.0, float("inf")), number=8).tolist() == [0.25] * 8


def test_the_seed_makes_the_times():
    assert (gaps(TrafficPattern(8.0)) == gaps(TrafficPattern(8.0))).all()
    assert (gaps(TrafficPattern(8.0)) != gaps(TrafficPattern(8.0), seed=1)).any()


@pytest.mark.parametrize(("strategy", "middle"), [("linear", 20.5), ("exponential", 40**0.5)])
def test_the_rate_ramps_up(strategy, middle):
    values = gaps(TrafficPattern(float("inf"), 1.0, strategy, 1.0, 40.0))
    edge = NUMBER // 50
    assert 1 / values[:edge].mean() == pytest.approx(1, rel=0.6)
    assert 1 / values[NUMBER // 2 - edge : NUMBER // 2 + edge].mean() == pytest.approx(middle, rel=0.15)
    assert 1 / values[-edge:].mean() == pytest.approx(40, rel=0.15)


def test_burstiness_leaves_the_rate_of_a_ramp_alone():
    values = gaps(TrafficPattern(float("inf"), 4.0, "linear", 10.0, 10.001))
    assert values.mean() == pytest.approx(0.1, rel=0.05)
    assert variation(values) == pytest.approx(0.5, rel=0.05)


def test_a_steady_ramp_has_the_rates_of_its_formula():
    values = gaps(TrafficPattern(float("inf"), float("inf"), "linear", 1.0, 4.0), number=4)
    assert (1 / values).tolist() == pytest.approx([1, 2, 3, 4])
    values = gaps(TrafficPattern(float("inf"), float("inf"), "exponential", 1.0, 8.0), number=4)
    assert (1 / values).tolist() == pytest.approx([1, 2, 4, 8])
