"""Part 8: what each budget is worth: the limits at which the recommendation would change, and to what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from knowledge_base import units
from knowledge_base.metrics import METRICS, find_metric
from knowledge_base.types import Budget
from planner import answering
from planner.reports.html._view import Row, View, of_ratio
from planner.reports.html._words import changes
from planner.results import PlanResult, Verdict

TITLE = "What each budget is worth"
LEAD = "The limits at which another plan would be recommended, all other budgets kept."
MOST_DIGITS = 7


def facts(view: View) -> dict[str, Any]:
    """Return, for each budget, the recommendation over all limits, and what that means in a sentence."""
    ladders = [_ladder(view, b) for b in view.answer.budgets if b.level != "off" and b.metric in METRICS]
    return {"ladders": [found for found in ladders if found["rungs"]], "source": view.kind_of_figures}


def _ladder(view: View, budget: Budget) -> dict[str, Any]:
    rungs = _rungs(view, budget)
    now = view.recommended
    here = next((i for i, (_, row) in enumerate(rungs) if row is now), None)
    limits = _limits(budget, [need for need, _ in rungs])
    shown = [
        {
            "limit": limit, "row": row, "now": row is now,
            "changes": changes(now, row, [*view.objectives, budget.metric]) if now and row is not now else [],
        }
        for limit, (_, row) in zip(limits, rungs, strict=True)
    ]  # fmt: skip
    return {
        "budget": budget.label,
        "written": budget.text,
        "rungs": shown,
        "sentence": _sentence(view, limits, rungs, here),
    }


def _rungs(view: View, budget: Budget) -> list[tuple[float, Row]]:
    """Return (limit, plan recommended from there on), from the strictest limit to the loosest.

    A plan enters when the limit reaches the end of its interval that has to be within: its verdict turns to met.
    """
    entering = []
    for row in view.shown:
        own = [v for v in row.result.verdicts if v.budget == budget]
        rest = [v for v in row.result.verdicts if v.budget != budget and v.budget.level == "error"]
        if own and all(v.outcome == "met" for v in rest) and (need := _need(own[0])) is not None:
            entering.append((need, row))
    entering.sort(key=lambda pair: pair[0], reverse=budget.bound == "min")
    rungs: list[tuple[float, Row]] = []
    inside: list[PlanResult] = []
    for need, row in entering:
        inside.append(_within(row.result, budget))
        if rungs and _cannot_win(view, _within(rungs[-1][1].result, budget), inside[-1]):
            continue
        best = answering.recommend(answering.mark_front(inside, view.answer.objectives), view.answer.objectives)
        chosen = next((r for r in view.shown if best and r.result.plan == best.plan), None)
        if chosen and (not rungs or chosen is not rungs[-1][1]):
            rungs.append((need, chosen))
    return rungs


def _need(verdict: Verdict) -> float | None:
    """Return the strictest limit that would still be met, in the unit the budget is written in."""
    budget = verdict.budget
    if verdict.value is not None:
        need: float | None = verdict.value.mid
    elif verdict.figure is None:
        return None
    else:
        from planner.statistics import bounds_of

        paired = of_ratio(verdict)
        low, high = bounds_of(verdict.figure, verdict.figure.statistic if paired else budget.statistic)
        need = high if budget.bound == "max" else low
        if paired:
            return need
    if need is None or not budget.relative:
        return need
    return need / (verdict.limit / budget.value) if verdict.limit else None


def _within(result: PlanResult, budget: Budget) -> PlanResult:
    """Return the plan as it would be judged with this budget met; one that is out today could have been a finalist then."""
    verdicts = tuple(replace(v, outcome="met") if v.budget == budget else v for v in result.verdicts)
    return replace(result, verdicts=verdicts, finalist=result.finalist or not result.feasible)


def _cannot_win(view: View, best: PlanResult, other: PlanResult) -> bool:
    """Whether a plan is so much worse on the first objective that no rule could bring it up. Saves most work."""
    if other.finalist and not best.finalist:
        return False
    label = view.answer.objectives[0]
    ours, theirs = answering.value_of(best, label), answering.value_of(other, label)
    if ours is None or theirs is None or any(v.outcome != "met" for v in best.verdicts if v.budget.level == "warn"):
        return False
    sign = 1 if find_metric(label)[0].better == "lower" else -1
    return sign * theirs > sign * ours + answering.TIE * abs(ours)


def _limits(budget: Budget, values: list[float]) -> list[str]:
    """Return limits as text, with the fewest digits, three at least, that tell them apart."""
    sign = "≤" if budget.bound == "max" else "≥"
    for digits in range(3, MOST_DIGITS + 1):
        texts = [_limit(budget, value, digits) for value in values]
        if len(set(texts)) == len(texts):
            break
    return [f"{sign} {text}" for text in texts]


def _limit(budget: Budget, value: float, digits: int) -> str:
    """Return a limit rounded to the loose side: whoever types it in gets what was measured within it."""
    dimension = METRICS[budget.metric].dimension
    outward = 1 if budget.bound == "max" else -1
    for tenths in range(11 if value > 0 else 1):  # of the last digit shown
        moved = value * (1 + outward * tenths * 10.0**-digits)
        text = f"{moved:.{digits}g}" if budget.relative else units.format(moved, dimension, digits=digits)
        if value > 0 and outward * (_number(budget, text) - value) >= 0:
            break
    return f"{text}× baseline" if budget.relative else text


def _number(budget: Budget, text: str) -> float:
    return float(text) if budget.relative else units.parse(text, METRICS[budget.metric].dimension, field=budget.label)


def _sentence(view: View, limits: list[str], rungs: list[tuple[float, Row]], here: int | None) -> str:
    if not rungs:
        return ""
    if here is None or view.recommended is None:
        return f"With {limits[0]} the recommended plan would be {rungs[0][1].words}."
    parts = [f"Tightening it to {limits[here]} costs nothing."]
    if here + 1 < len(rungs):
        row = rungs[here + 1][1]
        gain = ", ".join(f"{c.label} {c.text}" for c in changes(view.recommended, row, view.objectives))
        parts.append(f"With {limits[here + 1]} you would get {row.words}: {gain or 'about the same'}.")
    else:
        parts.append("Loosening it gains nothing among these plans.")
    if here > 0:
        parts.append(f"Tighter than that, the choice would be {rungs[here - 1][1].words}.")
    else:
        parts.append("Tighter than that, none of these plans meets it.")
    return " ".join(parts)
