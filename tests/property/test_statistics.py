"""Laws of the statistics: intervals cover what they claim to, verdicts move one way, order and unit do not matter."""

from __future__ import annotations

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as s

from planner import statistics as st

POSITIVE = s.floats(min_value=1e-6, max_value=1e6)
SAMPLES = s.lists(POSITIVE, min_size=1, max_size=40)
RANK = {"not met": 0, "inconclusive": 1, "met": 2}


@pytest.mark.parametrize("n", [6, 10, 25])
def test_median_intervals_cover_the_median(n):
    rng = numpy.random.default_rng(1)
    trials, hits = 600, 0
    for _ in range(trials):
        figure = st.median_figure(rng.lognormal(0, 0.5, n).tolist())
        hits += figure.low <= 1.0 <= figure.high  # the median of exp(normal(0)) is 1
    assert hits / trials >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / trials)


@pytest.mark.parametrize("n", [9, 20])
def test_paired_ratio_intervals_cover_the_ratio(n):
    rng = numpy.random.default_rng(2)
    trials, hits = 300, 0
    for trial in range(trials):
        machine = rng.lognormal(0, 0.3, n)  # what both blocks of a pair share
        ours, theirs = 0.8 * machine * rng.lognormal(0, 0.05, n), machine * rng.lognormal(0, 0.05, n)
        figure = st.paired_ratio(ours.tolist(), theirs.tolist(), seed=trial)
        hits += figure.low <= 0.8 <= figure.high
    assert 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials) <= hits / trials <= 0.995


def test_the_upper_bound_of_p95_is_exceeded_as_rarely_as_promised():
    rng = numpy.random.default_rng(3)
    truth = math.exp(0.4 * 1.6448536269514722)
    trials = 800
    misses = 0
    for _ in range(trials):
        figure = st.median_figure(rng.lognormal(0, 0.4, 100).tolist())
        low, high = st.bounds_of(figure, "p95")
        assert low is not None and high is not None and low <= high
        misses += high < truth
    assert misses / trials <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / trials)


@given(SAMPLES)
def test_a_median_lies_in_its_interval_and_the_interval_in_the_samples(samples):
    figure = st.median_figure(samples)
    assert min(samples) <= figure.low <= figure.value <= figure.high <= max(samples)


@given(SAMPLES, s.randoms())
def test_the_order_of_samples_does_not_matter(samples, random):
    shuffled = random.sample(samples, len(samples))
    first, second = st.median_figure(samples), st.median_figure(shuffled)
    assert (first.value, first.low, first.high, first.p95) == (second.value, second.low, second.high, second.p95)


@given(s.lists(POSITIVE, min_size=2, max_size=30), s.integers(0, 5))
@settings(max_examples=50)
def test_mean_intervals_are_reproducible_and_hold_the_mean(samples, seed):
    first, second = st.mean_figure(samples, seed=seed), st.mean_figure(samples, seed=seed)
    assert first == second
    assert first.low <= first.value <= first.high


@given(s.lists(POSITIVE, min_size=6, max_size=120), POSITIVE, POSITIVE, s.sampled_from(["p50", "p95", "mean"]))
@settings(max_examples=60)
def test_a_looser_limit_is_never_judged_worse(samples, one, other, statistic):
    figure = st.median_figure(samples)
    tight, loose = sorted((one, other))
    assert RANK[st.judge(figure, tight, "max", statistic)] <= RANK[st.judge(figure, loose, "max", statistic)]
    assert RANK[st.judge(figure, loose, "min", statistic)] <= RANK[st.judge(figure, tight, "min", statistic)]


@given(s.lists(POSITIVE, min_size=1, max_size=30), s.sampled_from([0.5, 0.9, 0.95]))
def test_higher_confidence_never_narrows_the_bounds(samples, q):
    low_95, high_95 = st.quantile_interval(samples, q, 0.95)
    low_99, high_99 = st.quantile_interval(samples, q, 0.99)
    assert low_99 is None or (low_95 is not None and low_99 <= low_95)
    assert high_99 is None or (high_95 is not None and high_99 >= high_95)


@given(s.lists(s.tuples(POSITIVE, POSITIVE), min_size=2, max_size=20))
@settings(max_examples=50)
def test_turning_a_ratio_round_inverts_it(pairs):
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    forward, backward = st.paired_ratio(ours, theirs, seed=1), st.paired_ratio(theirs, ours, seed=1)
    assert forward.value == pytest.approx(1 / backward.value, rel=1e-9)
    assert forward.low == pytest.approx(1 / backward.high, rel=1e-6)


@given(SAMPLES)
def test_warm_up_never_drops_everything(samples):
    dropped, settled = st.warm_up_length(samples)
    assert 0 <= dropped < len(samples)
    assert not settled or len(samples) - dropped >= 4
