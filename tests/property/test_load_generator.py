"""What is drawn before a load, and what is made of what came back: laws that hold for every seed."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge_base.errors import BadInput
from knowledge_base.types import Trace, Workload
from planner.load.client import Answer
from planner.load.driving import Driven, Protocol
from planner.load.requests import Conversation, Words, conversations
from planner.load.telling import GROWS, PARTS, kendall, seen, under_way
from planner.load.trace import Row

SEEDS = st.integers(0, 2**31 - 1)


def first(workload: Workload, count: int, seed: int, **more: object) -> list[Conversation]:
    return list(itertools.islice(conversations(workload, seed=seed, **more), count))  # type: ignore[arg-type]


# ---------------------------------------------------------------- arrivals and lengths


@given(SEEDS, st.floats(0.01, 1e4))
@settings(max_examples=30, deadline=None)
def test_arrivals_are_poissons(seed: int, rate: float) -> None:
    """Gaps have the mean 1 / rate and as large a deviation; each within five standard errors."""
    times = [c.at_s or 0.0 for c in first(Workload(prompt_tokens=1, output_tokens=1, requests_per_s=rate), 2000, seed)]
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert min(gaps) >= 0
    assert statistics.fmean(gaps) * rate == pytest.approx(1, abs=5 / 2000**0.5)
    assert statistics.pstdev(gaps) * rate == pytest.approx(1, abs=5 * 2**0.5 / 2000**0.5)
    assert abs(statistics.correlation(gaps[:-1], gaps[1:])) < 5 / 2000**0.5


@given(SEEDS, st.floats(1.1, 100))
def test_a_seed_is_one_load_and_another_rate_the_same_requests_at_other_times(seed: int, factor: float) -> None:
    slow = Workload(prompt_tokens=50, prompt_tokens_p95=400, output_tokens=9, output_tokens_p95=20, requests_per_s=2.0)
    quick = Workload(
        prompt_tokens=50, prompt_tokens_p95=400, output_tokens=9, output_tokens_p95=20, requests_per_s=2.0 * factor
    )
    a, again, b = first(slow, 20, seed), first(slow, 20, seed), first(quick, 20, seed)
    assert a == again
    assert [c.turns for c in a] == [c.turns for c in b]
    assert [c.at_s for c in b] == pytest.approx([(c.at_s or 0) / factor for c in a])
    assert [c.turns for c in a] != [c.turns for c in first(slow, 20, seed + 1)]


@given(SEEDS, st.integers(1, 4000), st.integers(0, 4000))
@settings(max_examples=30, deadline=None)
def test_drawn_lengths_have_their_percentiles(seed: int, p50: int, more: int) -> None:
    workload = Workload(prompt_tokens=p50, prompt_tokens_p95=p50 + more, output_tokens=1)
    lengths = [c.turns[0].new_tokens for c in first(workload, 1000, seed)]
    assert min(lengths) >= 1
    assert sum(n <= p50 for n in lengths) / 1000 > 0.42  # five standard errors; rounding adds to the middle
    assert sum(n >= p50 for n in lengths) / 1000 > 0.42
    assert sum(n <= p50 + more for n in lengths) / 1000 > 0.915
    assert sum(n >= p50 + more for n in lengths) / 1000 > 0.015


@given(SEEDS, st.integers(1, 30), st.integers(1, 30), st.integers(0, 29), st.integers(1, 6), st.integers(-3, 20))
def test_no_conversation_is_longer_than_the_context(
    seed: int, prompt: int, output: int, shared: int, turns: int, room: int
) -> None:
    workload = Workload(
        prompt_tokens=prompt + shared, prompt_tokens_p95=2 * (prompt + shared), output_tokens=output,
        output_tokens_p95=3 * output, shared_prefix_tokens=shared, turns=turns,
    )  # fmt: skip
    room += workload.longest_tokens
    if workload.longest_tokens > room:
        with pytest.raises(BadInput):
            first(workload, 1, seed, context_tokens=room)
        return
    for conversation in first(workload, 30, seed, context_tokens=room):
        assert 1 <= len(conversation.turns) <= turns
        assert all(t.new_tokens >= 1 and t.output_tokens >= 1 for t in conversation.turns)
        assert sum(t.new_tokens + t.output_tokens for t in conversation.turns) <= room


ROWS = st.lists(st.tuples(st.floats(0, 1e5), st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=30)


@given(SEEDS, ROWS)
def test_a_trace_is_replayed_at_its_times(seed: int, told: list[tuple[float, int, int]]) -> None:
    rows = [Row(i + 2, *row) for i, row in enumerate(sorted(told))]
    workload = Workload(prompt_tokens=1, output_tokens=1, requests_per_s=3.0, trace=Trace(file="t", requests=len(rows)))
    found = list(conversations(workload, seed=seed, rows=rows))
    assert [(c.at_s, c.turns[0].new_tokens, c.turns[0].output_tokens) for c in found] == sorted(told)
    lengths = Workload(prompt_tokens=1, output_tokens=1, requests_per_s=3.0, trace=Trace(file="t", replayed=False))
    drawn = first(lengths, len(rows), seed, rows=rows)
    assert sorted((c.turns[0].new_tokens, c.turns[0].output_tokens) for c in drawn) == sorted(r[1:] for r in told)
    assert [c.at_s for c in drawn] == [c.at_s for c in first(Workload(prompt_tokens=1, output_tokens=1, requests_per_s=3.0), len(rows), seed)]  # fmt: skip


def test_a_row_longer_than_the_context_is_told_with_its_line() -> None:
    rows = [Row(2, 0.0, 10, 10), Row(7, 1.0, 90, 11)]
    workload = Workload(prompt_tokens=1, output_tokens=1, trace=Trace(file="day.csv"))
    with pytest.raises(BadInput, match=r"day.csv:7: prompt 90 \+ output 11 tokens > context 100"):
        list(conversations(workload, seed=0, rows=rows, context_tokens=100))


@given(SEEDS, st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(0, 50))
def test_prompts_have_the_length_asked_for(seed: int, counts: list[int], text: int) -> None:
    words = Words(seed=seed, text=range(1000, 1000 + text))
    for count in counts:
        taken = words.take(count)
        assert len(taken) == count
        assert not text or set(taken) <= set(range(1000, 1000 + text))


# ---------------------------------------------------------------- what came back


def served(rate: float, service_s: float, count: int, seed: int, *, spread: bool = False) -> Driven:
    """Simulate one server with a line before it: what a load generator would have seen of it."""
    chance = random.Random(seed)
    at_s = free_s = 0.0
    answers = []
    for _ in range(count):
        at_s += chance.expovariate(rate)
        free_s = max(at_s, free_s) + (chance.expovariate(1 / service_s) if spread else service_s)
        answers.append(Answer(due_s=at_s, prompt_tokens=1, asked_tokens=2, token_s=[free_s, free_s + 1e-3], tokens=2, answered=True))  # fmt: skip
    return Driven("arrivals", answers, from_s=0.0, until_s=at_s + 1e-9)


@given(SEEDS)
@settings(max_examples=8, deadline=None)
def test_an_overloaded_server_is_never_called_steady(seed: int) -> None:
    assert not seen(served(1.5, 1.0, 200, seed), Protocol()).steady


def test_a_server_with_room_is_called_steady() -> None:
    steady = [seen(served(0.6, 1.0, 300, seed), Protocol()).steady for seed in range(40)]
    assert sum(steady) >= 37


def test_intervals_of_percentiles_cover_the_truth() -> None:
    """Independent exponential times: of 300 loads, the interval holds the true percentile as often as it says."""
    covered = {"p50": 0, "p95": 0}
    truth = {"p50": 0.6931, "p95": 2.9957}
    for seed in range(300):
        chance = random.Random(seed)
        answers = [
            Answer(due_s=float(i), prompt_tokens=1, asked_tokens=1, token_s=[i + chance.expovariate(1)], tokens=1, answered=True)
            for i in range(200)
        ]  # fmt: skip
        told = seen(Driven("clients", answers, until_s=200.0), Protocol()).percentiles["latency_s"]
        for p in covered:
            low, high = told[p].low, told[p].high
            covered[p] += low is not None and high is not None and low <= truth[p] <= high
    assert covered["p50"] >= 0.95 * 300 - 3 * (300 * 0.95 * 0.05) ** 0.5
    assert covered["p95"] >= 0.98 * 300 - 3 * (300 * 0.98 * 0.02) ** 0.5


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=12))
def test_a_trend_reversed_is_its_opposite(values: list[int]) -> None:
    assert kendall(values) == -kendall(values[::-1])
    assert kendall(list(range(PARTS))) == PARTS * (PARTS - 1) // 2 >= GROWS


@given(st.lists(st.tuples(st.floats(0, 90), st.floats(0.001, 50)), min_size=1, max_size=20))
def test_requests_under_way_add_up_to_their_times(spans: list[tuple[float, float]]) -> None:
    answers = [
        Answer(due_s=a, prompt_tokens=1, asked_tokens=1, token_s=[a + d], tokens=1, answered=True) for a, d in spans
    ]
    inside = sum(min(a + d, 100.0) - a for a, d in spans)
    assert sum(under_way(answers, 0.0, 100.0)) * 10.0 == pytest.approx(inside)
