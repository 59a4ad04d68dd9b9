"""Laws of a run's forecast, on facts alone: nothing is run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from knowledge_base.types import Budget
from planner.forecast import sample
from planner.foreseeing import Experience, around, foresee, trying_s
from planner.predicting import learned
from planner.room import Room
from planner.run_forecast import AMOUNTS, STAGES, RunForecast
from planner.spec import from_mapping
from search.problem import Priced, Problem
from search.space import build_space

SPEC = replace(
    from_mapping(
        {
            "model": "toy",
            "objectives": ["tpot_p50", "artefact_size"],
            "search": {"effort": "quick", "time_limit": "6 min", "max_measured": 10},
        }
    ),
    workload=TOY_WORKLOAD,
)
positive = st.floats(1e-3, 1e12)
ratio = st.floats(0.1, 10.0)


@pytest.fixture(scope="module")
def priced() -> Priced:
    space = build_space(
        TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, engine_names=("transformers", "llama_cpp"), only=("weight_gguf", "weight_int8"),
        without=(), calibration=False, executable=False,
    )  # fmt: skip
    problem = Problem(
        model=TOY_MODEL,
        workload=TOY_WORKLOAD,
        hardware=TOY_MACHINE,
        space=space,
        budgets=(),
        objectives=SPEC.objectives,
    )
    return sample(problem)


def told(priced: Priced, experience: Experience = Experience(), **search: object) -> RunForecast:  # noqa: B008
    return foresee(replace(SPEC, search=replace(SPEC.search, **search)), priced, experience)  # type: ignore[arg-type]


def sound(forecast: RunForecast) -> None:
    assert tuple(forecast.stages_s) == STAGES
    assert set(forecast.amounts) == set(AMOUNTS)
    for name, amount in (*forecast.amounts.items(), *forecast.stages_s.items()):
        assert 0 <= amount.low <= amount.mid <= amount.high < math.inf, name
        assert amount.because, name
        assert amount.held is None, name


@given(
    st.integers(1, 60),
    st.floats(20, 7200),
    st.sampled_from(["quick", "normal", "thorough"]),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_every_interval_holds_its_middle_and_the_stages_add_up(
    priced: Priced, most: int, limit_s: float, effort: str, all_known: bool, first_known: bool
) -> None:
    known = (
        frozenset(priced.plans) if all_known else frozenset({priced.problem.space.unchanged()} if first_known else ())
    )
    forecast = told(priced, Experience(known=known), max_measured=most, time_limit_s=limit_s, effort=effort)
    sound(forecast)
    wall, stages = forecast.amounts["wall_s"], forecast.stages_s.values()
    assert wall.mid == pytest.approx(sum(s.mid for s in stages))
    assert wall.low == pytest.approx(sum(s.low for s in stages))
    assert forecast.amounts["candidates"].high <= most


@given(st.integers(1, 30), st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_more_candidates_never_take_less(priced: Priced, one: int, more: int) -> None:
    few, many = (told(priced, max_measured=n, time_limit_s=1e5) for n in (one, one + more))
    for name in ("candidates", "wall_s", "disk_bytes", "peak_memory_bytes"):
        for end in ("low", "mid", "high"):
            assert getattr(few.amounts[name], end) <= getattr(many.amounts[name], end) + 1e-9, (name, end)


@given(st.integers(1, 40), st.floats(20, 3600), st.floats(1, 5))
@settings(deadline=None, max_examples=30)
def test_a_longer_limit_never_measures_fewer_plans(priced: Priced, most: int, limit_s: float, longer: float) -> None:
    short, long = (told(priced, max_measured=most, time_limit_s=s).amounts for s in (limit_s, limit_s * longer))
    for end in ("low", "mid", "high"):
        assert getattr(short["candidates"], end) <= getattr(long["candidates"], end)


@given(st.floats(20, 7200), st.lists(ratio, max_size=40))
@settings(deadline=None, max_examples=30)
def test_a_run_is_never_expected_beyond_its_time_limit(priced: Priced, limit_s: float, ratios: list[float]) -> None:
    seen = Experience(ratios={"build": tuple(ratios), "measure llama_cpp": tuple(ratios)})
    forecast = told(priced, seen, time_limit_s=limit_s, max_measured=60)
    least = sum(forecast.stages_s[name].mid for name in ("unchanged", "search", "finals"))  # take what they take
    beyond = forecast.stages_s["prepare"].high + limit_s + 30 + least
    assert forecast.amounts["wall_s"].high <= beyond


@given(positive, st.floats(0.06, 1.5), st.lists(ratio, max_size=40))
def test_what_was_seen_moves_an_amount_towards_it(prior: float, log_sd: float, ratios: list[float]) -> None:
    amount = around(prior, log_sd, ratios)
    assert amount.low <= amount.mid <= amount.high
    assert amount.prior == prior
    ends = [prior, *(prior * r for r in ratios)]
    assert min(ends) * (1 - 1e-9) <= amount.mid <= max(ends) * (1 + 1e-9)


def test_runs_that_agree_narrow_the_interval_and_runs_that_do_not_widen_it() -> None:
    first, steady, wild = around(10, 0.5), around(10, 0.5, [1.1] * 12), around(10, 0.5, [0.1, 9.0] * 6)
    assert steady.high / steady.low < first.high / first.low < wild.high / wild.low
    assert "12 earlier" in steady.because and "prior" in first.because


@given(st.floats(0, 2**36), st.floats(0, 2**36), st.floats(0, 2**36), st.floats(0, 2**36))
@settings(deadline=None, max_examples=60)
def test_more_room_never_stands_in_the_way(
    priced: Priced, memory: float, disk: float, more: float, less: float
) -> None:
    def room(extra: float) -> Room:
        return Room(
            memory_bytes=memory + extra, memory_limit_bytes=memory + extra, disk_bytes=disk + extra,
            disk_limit_bytes=disk + extra, scoring_bytes=less,
        )  # fmt: skip

    unchanged = priced.problem.price([priced.problem.space.unchanged()])
    assert len(room(more).obstacles(SPEC, unchanged)) <= len(room(0).obstacles(SPEC, unchanged))
    tight, wide = (sum(int(n.sum()) for n in room(extra).beyond(priced).values()) for extra in (0, more))
    assert wide <= tight
    assert not room(2**60).obstacles(SPEC, unchanged)
    said = Room(memory_bytes=1, memory_limit_bytes=1, disk_bytes=1, disk_limit_bytes=1, scoring_bytes=less).obstacles(
        SPEC, unchanged
    )
    assert [word in " ".join(said) for word in ("limits.memory", "limits.disk", "leanplan clean")] == [True] * 3


def test_budgets_decide_which_plans_are_in_mind(priced: Priced) -> None:
    faithful = Budget(metric="quality_loss_ratio", statistic="mean", bound="max", value=0.001)
    strict = replace(priced, problem=replace(priced.problem, budgets=(faithful,)))
    assert (
        told(strict).amounts["disk_bytes"].mid > told(priced).amounts["disk_bytes"].mid
    )  # those that lose little are large


def test_without_measurements_nothing_is_learned() -> None:
    assert learned((), TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE) is None


def test_trying_single_steps_is_counted_where_it_is_done(priced: Priced) -> None:
    space = build_space(
        TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, engine_names=("transformers",), only=("prune_width",), executable=False
    )
    asked = replace(SPEC, objectives=("tpot_p50", "quality_loss"))
    text = from_mapping({"model": "toy", "objectives": ["ttft"], "calibration": {"data": "bundled"}}).calibration
    assert trying_s(replace(asked, calibration=text), space) == pytest.approx(36.0)
    assert trying_s(asked, space) == 0  # no text to execute them with
    assert trying_s(replace(SPEC, calibration=text), space) == 0  # quality is not asked for
    assert trying_s(replace(asked, calibration=text), priced.problem.space) == 0  # nothing there rewrites the model
    short = replace(SPEC.search, time_limit_s=60.0)
    assert trying_s(replace(asked, calibration=text, search=short), space) == 0  # too little time to begin

    problem = replace(priced.problem, space=space, objectives=asked.objectives)
    with_text, without = (
        foresee(replace(asked, calibration=calibration), sample(problem), Experience()).stages_s["search"]
        for calibration in (text, None)
    )
    assert with_text.mid - without.mid > 10.0 and "single steps" in with_text.because
