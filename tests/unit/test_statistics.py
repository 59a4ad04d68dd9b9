"""Known cases of the statistics, each with the answer worked out elsewhere."""

from __future__ import annotations

import pytest

from knowledge_base.types import Figure
from planner import statistics as st


@pytest.mark.rule("measured percentiles")
def test_needed_samples_are_those_of_mlperf():
    table = {0.5: (7, 11, 14), 0.9: (44, 64, 81), 0.95: (90, 130, 165), 0.99: (459, 662, 838)}
    assert {q: tuple(st.minimal_samples(q, over) for over in range(3)) for q in table} == table


def test_median_interval_of_ten_is_the_second_and_ninth():
    figure = st.median_figure([9, 2, 7, 4, 5, 6, 3, 8, 1, 10])
    assert (figure.value, figure.low, figure.high, figure.n) == (5.5, 2, 9, 10)
    assert figure.p95 is None


def test_few_samples_state_the_confidence_they_have():
    figure = st.median_figure([3.0, 1.0, 2.0, 5.0])
    assert (figure.low, figure.high, figure.confidence) == (1.0, 5.0, 0.875)


@pytest.mark.rule("measured percentiles")
def test_a_percentile_needs_its_number_of_samples():
    assert st.percentile(list(range(89)), 0.95) is None
    assert st.percentile(list(range(90)), 0.95) == 85
    assert st.percentile(list(range(458)), 0.99) is None
    assert st.percentile(list(range(459)), 0.99) is not None


def test_p95_from_ninety_samples_can_be_met_and_from_few_only_missed():
    ninety = st.median_figure([10 + i / 100 for i in range(90)])
    assert st.judge(ninety, 11.0, "max", "p95") == "met"
    few = st.median_figure([10 + i / 100 for i in range(9)])
    assert st.judge(few, 11.0, "max", "p95") == "inconclusive"
    assert st.judge(few, 9.0, "max", "p95") == "not met"


@pytest.mark.promise("P9")
@pytest.mark.rule("measured verdicts")
def test_verdict_needs_the_whole_interval_on_one_side():
    figure = Figure(value=10, low=9, high=11, n=10)
    assert [st.judge(figure, limit, "max") for limit in (8.9, 9, 10, 10.9, 11)] == [
        "not met", "inconclusive", "inconclusive", "inconclusive", "met",
    ]  # fmt: skip
    assert [st.judge(figure, limit, "min") for limit in (9, 9.1, 11, 11.1)] == [
        "met", "inconclusive", "inconclusive", "not met",
    ]  # fmt: skip


def test_an_exact_figure_is_judged_exactly():
    figure = st.exact_figure(100)
    assert st.judge(figure, 100, "max") == "met"
    assert st.judge(figure, 99, "max") == "not met"
    assert st.judge(figure, 100, "min") == "met"


def test_paired_ratio_cancels_what_both_shared():
    drift = [1.0, 1.3, 0.8, 2.0, 1.1, 0.9, 1.7, 1.2, 1.0]
    figure = st.paired_ratio([5 * d for d in drift], [10 * d for d in drift], seed=0)
    assert figure.value == pytest.approx(0.5)
    assert figure.low == pytest.approx(0.5) and figure.high == pytest.approx(0.5)
    assert figure.note == ""
    assert "too few" in st.paired_ratio([1.0, 2.0], [1.0, 1.0], seed=0).note


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_paired_ratio_refuses_what_has_no_ratio(ours, theirs):
    with pytest.raises(ValueError, match="positive"):
        st.paired_ratio(ours, theirs, seed=0)


@pytest.mark.rule("measured warm")
def test_warm_up_drops_the_slow_start_and_no_more():
    steady = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 1.0, 0.99, 1.0, 1.01, 1.0, 0.99, 1.0] * 2
    assert st.warm_up_length(steady) == (3, True)
    slow_start = [1.6, 1.5, 1.4, 1.35, 1.3, *steady]
    dropped, settled = st.warm_up_length(slow_start)
    assert settled and 3 <= dropped <= 6


@pytest.mark.rule("measured warm")
def test_warm_up_that_never_settles_says_so():
    drifting = [1.3**i for i in range(16)]
    assert st.warm_up_length(drifting)[1] is False
    assert st.warm_up_length([1.0, 1.0]) == (1, False)
    assert st.warm_up_length([]) == (0, False)


def test_warm_up_may_not_eat_more_than_a_fifth_of_the_time():
    values = [5 - 0.2 * i for i in range(20)]
    dropped, settled = st.warm_up_length(values)
    assert not settled
    assert dropped == 3 or sum(values[:dropped]) <= 0.2 * sum(values)


@pytest.mark.rule("measured stability")
def test_stability_names_what_is_wrong():
    assert st.stability([1.0, 1.01, 0.99, 1.0, 1.0]) == ()
    assert any("vary by" in s for s in st.stability([1.0, 1.3, 0.8, 1.2, 0.9]))
    assert any("extremes" in s for s in st.stability([1.0] * 20 + [2.0]))
    assert any("first counted run" in s for s in st.stability([1.4, 1.0, 1.01, 0.99, 1.0, 1.0]))
    assert any("other processes kept 0.50 cores" in s for s in st.stability([1.0, 1.0], other_cores=0.5))
    assert any("not settled" in s for s in st.stability([1.0, 1.0], settled=False))


@pytest.mark.parametrize("samples", [[], [float("nan")], [1.0, float("inf")]])
def test_samples_that_are_not_finite_are_refused(samples):
    with pytest.raises(ValueError, match="finite"):
        st.median_figure(samples)
