"""The front, the recommendation and the reasons, on figures small enough to check by eye."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests_support import TOY_MODEL

from knowledge_base.types import Budget, Figure, Measurement, Plan, Step
from planner import answering
from planner.judging import judge
from planner.results import PlanResult

OBJECTIVES = ("tpot_p50", "peak_memory", "quality_loss")
LIMIT = Budget(metric="quality_loss_ratio", statistic="mean", bound="max", value=0.05, text="5 %")


def result(name: str | None, tpot_s: float, peak: float, loss: float, *, spread: float = 0.001) -> PlanResult:
    steps = (Step(name),) if name else ()
    figures = {
        metric: Figure(value=v, low=v - spread * abs(v), high=v + spread * abs(v), n=10)
        for metric, v in {"tpot_s": tpot_s, "peak_memory_bytes": peak, "quality_loss_ratio": loss}.items()
    }
    plan = Plan(model_digest=TOY_MODEL.digest, engine="transformers", steps=steps)
    measurement = Measurement(plan=plan, key=name or "baseline", hardware_fingerprint="toy", figures=figures)
    return PlanResult(plan=plan, measurement=measurement, verdicts=judge([LIMIT], baseline={}, measurement=measurement))


BASELINE = result(None, 1.0, 100.0, 0.0)
FAST = result("fast", 0.5, 90.0, 0.02)
SMALL = result("small", 0.9, 40.0, 0.04)
WORSE = result("worse", 0.95, 95.0, 0.03)
BROKEN = result("broken", 0.1, 10.0, 0.9)


def test_front_holds_only_feasible_undominated_plans() -> None:
    marked = answering.mark_front([BASELINE, FAST, SMALL, WORSE, BROKEN], OBJECTIVES)
    assert [r.on_front for r in marked] == [True, True, True, False, False]


def test_the_first_objective_decides() -> None:
    marked = answering.mark_front([BASELINE, FAST, SMALL, BROKEN], OBJECTIVES)
    best = answering.recommend(marked, OBJECTIVES)
    assert best and best.plan == FAST.plan
    best = answering.recommend(marked, ("peak_memory", "tpot_p50"))
    assert best and best.plan == SMALL.plan


def test_near_ties_go_to_the_next_objective() -> None:
    nearly = result("nearly", 0.51, 30.0, 0.02)
    marked = answering.mark_front([BASELINE, FAST, nearly], OBJECTIVES)
    best = answering.recommend(marked, OBJECTIVES)
    assert best and best.plan == nearly.plan


def test_a_finalist_is_not_passed_over_for_a_figure_taken_while_the_machine_was_quicker() -> None:
    slowed = replace(result("again", 0.6, 80.0, 0.02), finalist=True)  # 0.5 before, as FAST was, which came no further
    marked = answering.mark_front([BASELINE, FAST, slowed], OBJECTIVES)
    best = answering.recommend(marked, OBJECTIVES)
    assert best and best.plan == slowed.plan


def test_what_screening_left_a_little_behind_is_timed_in_turns_too() -> None:
    """Times may change in turns, sizes and losses do not: SMALL's memory is nobody else's, `heavy` is nowhere near."""
    nearly, heavy = result("nearly", 0.6, 95.0, 0.02), result("heavy", 0.9, 95.0, 0.03)
    found = answering.contenders([BASELINE, heavy, nearly, FAST, SMALL], OBJECTIVES)
    assert [r.plan for r in found] == [r.plan for r in (BASELINE, FAST, SMALL, nearly)]
    assert not {heavy.plan, BASELINE.plan} & {
        r.plan for r in answering.contenders([BASELINE, heavy, FAST], ("tpot_p50",))
    }


def test_a_finalist_is_on_the_front_of_finalists_whatever_was_taken_at_quicker_times() -> None:
    first, second = (replace(result(n, t, 95.0, 0.03), finalist=True) for n, t in (("first", 0.6), ("second", 0.7)))
    marked = answering.mark_front([BASELINE, FAST, first, second], OBJECTIVES)
    assert [r.on_front for r in marked] == [True, True, True, False]
    best = answering.recommend(marked, OBJECTIVES)
    assert best and best.plan == first.plan


def test_nothing_is_recommended_when_nothing_fits() -> None:
    marked = answering.mark_front([BROKEN], OBJECTIVES)
    assert answering.recommend(marked, OBJECTIVES) is None
    lines = answering.nearest(marked, [LIMIT])
    assert "quality_loss" in lines[0]
    assert "nearest to all budgets" in lines[-1]


@pytest.mark.promise("P9")
@pytest.mark.parametrize(
    ("loss", "spread", "outcome"), [(0.04, 0.01, "met"), (0.06, 0.01, "not met"), (0.05, 0.2, "inconclusive")]
)
def test_verdicts_follow_the_interval(loss: float, spread: float, outcome: str) -> None:
    assert result("x", 1.0, 1.0, loss, spread=spread).verdicts[0].outcome == outcome


@pytest.mark.row(15)
@pytest.mark.rule("measured energy")
def test_a_modelled_figure_does_not_satisfy_a_measured_budget() -> None:
    budget = Budget(metric="energy_j_per_token", statistic="mean", bound="max", value=1.0)
    figure = Figure(value=0.1, low=0.1, high=0.1, n=1, source="modelled")
    measurement = Measurement(plan=FAST.plan, key="k", hardware_fingerprint="f", figures={"energy_j_per_token": figure})
    (verdict,) = judge([budget], baseline={}, measurement=measurement)
    assert verdict.outcome == "not judged"
    assert "source: any" in verdict.sentence


def test_a_step_is_explained_by_the_measured_plan_without_it() -> None:
    why = answering.reasons(FAST, [BASELINE, FAST], {}, OBJECTIVES)
    assert any("fast: tpot -50%" in line and "measured" in line for line in why)
