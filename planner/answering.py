"""From what was measured (or predicted) to the answer: the front, the recommendation, and the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import cost_models
from knowledge_base import units
from knowledge_base.metrics import METRICS, find_metric
from knowledge_base.types import Budget, Estimate, Plan
from planner.results import ParetoSet, PlanResult, Rejection, Verdict

NEAR = 1.5  # times as slow as the front, that a plan may be when screened and be on it in turns
TIMED_RESOURCES = ("computation", "energy", "money")  # what metrics of these say depends on when they were measured
TIE = 0.03  # figures closer than this share are equal for a recommendation: the next objective decides


def value_of(result: PlanResult, label: str) -> float | None:
    """Return a result's figure for an objective: measured if it was measured, else predicted."""
    metric, statistic = find_metric(label)
    if result.measurement:
        figure = result.measurement.figures.get(metric.name)
        if figure is None:
            return None
        from planner.statistics import point

        return point(figure, statistic)
    value = result.estimate.values.get(metric.name) if result.estimate else None
    return value.mid if value else None


def mark_front(results: Sequence[PlanResult], objectives: Sequence[str]) -> list[PlanResult]:
    """Return the results with `on_front` set: undominated among the feasible ones, or among all when none is.

    A finalist is dominated by finalists alone: the others' figures were taken at other times, maybe quicker ones.
    """
    import numpy as np

    from search.pareto import front

    values = _values(results, objectives)
    field = [i for i in values if results[i].feasible] or list(values)
    signs = np.array([1.0 if find_metric(label)[0].better == "lower" else -1.0 for label in objectives])
    chosen = {
        among[k]
        for among in (field, [i for i in field if results[i].finalist])
        if among
        for k in front(signs * np.array([values[i] for i in among]))
    }
    return [replace(r, on_front=i in chosen) for i, r in enumerate(results)]


def contenders(results: Sequence[PlanResult], objectives: Sequence[str]) -> list[PlanResult]:
    """Return the results that may be on the front once all are measured in turns, likeliest first.

    Those on it; then those that are off it by times and energies up to NEAR times too large: they were measured minutes
    apart, and a shared machine is that much slower for a while.
    """
    import numpy as np

    from search.pareto import shortfall

    values = _values(results, objectives)
    if not values:
        return []
    metrics = [find_metric(label)[0] for label in objectives]
    signs = np.array([1.0 if m.better == "lower" else -1.0 for m in metrics])
    timed = np.array([m.resource in TIMED_RESOURCES and m.name != "build_s" for m in metrics])
    costs = np.array(list(values.values()))
    costs[:, timed] = np.log(np.maximum(costs[:, timed], np.finfo(float).tiny))
    short = np.maximum(shortfall(signs * costs, timed), 0.0)
    order = [k for k in np.argsort(short, kind="stable") if short[k] <= np.log(NEAR)]
    return [results[list(values)[k]] for k in order]


def _values(results: Sequence[PlanResult], objectives: Sequence[str]) -> dict[int, list[float]]:
    """Return the objectives' values of the results that have them all, by their place."""
    found = {}
    for i, result in enumerate(results):
        values = [value_of(result, label) for label in objectives]
        if not failed(result) and None not in values:
            found[i] = [float(v) for v in values if v is not None]
    return found


def recommend(results: Sequence[PlanResult], objectives: Sequence[str]) -> PlanResult | None:
    """Return the feasible plan that is best on the first objective, near-ties settled by the next ones.

    Plans that also meet the budgets of level warn come before those that do not, then finalists before the rest: only
    their figures were taken in turns, so that a machine that slowed down meanwhile favours none. None when no plan
    meets every error budget.
    """
    field = [r for r in results if r.feasible and not failed(r) and r.on_front]
    field = [r for r in field if all(v.outcome == "met" for v in r.verdicts)] or field
    field = [r for r in field if r.finalist] or field
    for label in objectives:
        sign = 1 if find_metric(label)[0].better == "lower" else -1
        scored = [(sign * value, r) for r in field if (value := value_of(r, label)) is not None]
        if scored:
            best = min(score for score, _ in scored)
            field = [r for score, r in scored if score <= best + TIE * abs(best)]
    return field[0] if field else None


def failed(result: PlanResult) -> bool:
    """Return whether a measured candidate has a failure instead of figures."""
    return bool(result.measurement and result.measurement.failure)


def sentence(best: PlanResult | None, results: Sequence[PlanResult], objectives: Sequence[str], measured: bool) -> str:
    """Return the answer in one sentence."""
    if best is None:
        inconclusive = [
            r for r in results if not failed(r) and r.verdicts and all(v.outcome != "not met" for v in errors(r))
        ]
        if inconclusive:
            return f"No plan is certain to meet every budget; {len(inconclusive)} cannot be told apart from it."
        return "No plan meets every budget."
    changes = []
    for label in objectives:
        metric, _ = find_metric(label)
        value, reference = value_of(best, label), value_of(results[0], label)
        if value is None:
            continue
        text = f"{metric.label} {units.format(value, metric.dimension)}"
        if metric.name in best.ratios and best.plan != results[0].plan:
            text += f" ({best.ratios[metric.name].value:.2f}× the unchanged model's, interleaved)"
        elif reference and best.plan != results[0].plan and metric.dimension != "ratio":
            text += f" ({value / reference:.2f}× the unchanged model's)"
        changes.append(text)
    kind = "measured" if measured else "predicted"
    return f"{best.plan.words}: {', '.join(changes)}; {kind}."


def errors(result: PlanResult) -> list[Verdict]:
    """Return the verdicts on budgets of level error."""
    return [v for v in result.verdicts if v.budget.level == "error"]


def reasons(
    result: PlanResult, results: Sequence[PlanResult], price: Mapping[Plan, Estimate], objectives: Sequence[str]
) -> tuple[str, ...]:
    """Return why a plan is what it is: what each step bought and cost, and which budgets bind.

    A step's effect is measured where the same plan without it was measured too, else predicted, and said so.

    Args:
        price: predicted estimates of the plan and of the plan less each step.
    """
    if not result.plan.steps:
        lines = ["the model as it came" if result is results[0] else f"the unchanged weights on {result.plan.engine}"]
    else:
        lines = []
    by_plan = {r.plan: r for r in results if r.measurement and not failed(r)}
    for step in result.plan.steps:
        fewer = replace(result.plan, steps=tuple(s for s in result.plan.steps if s != step))
        if result.plan in by_plan and fewer in by_plan:
            before, after, kind = by_plan[fewer], result, "measured"
        elif fewer in price and result.plan in price:
            before, after, kind = (
                PlanResult(plan=fewer, estimate=price[fewer]),
                PlanResult(plan=result.plan, estimate=price[result.plan]),
                "predicted",
            )
        else:
            continue
        effects = []
        for name in dict.fromkeys(
            [
                *(find_metric(o)[0].name for o in objectives),
                "tpot_s",
                "ttft_s",
                "peak_memory_bytes",
                "artefact_bytes",
                "quality_loss_ratio",
            ]
        ):
            a, b = value_of(before, name), value_of(after, name)
            if a is None or b is None:
                continue
            if METRICS[name].dimension == "ratio":
                if abs(b - a) >= 0.0005:
                    effects.append(f"{METRICS[name].label} {b - a:+.1%} points")
            elif a and abs(b / a - 1) >= 0.01:
                effects.append(f"{METRICS[name].label} {b / a - 1:+.0%}")
        lines.append(f"{step}: {', '.join(effects) or 'no effect of 1 % or more'} ({kind})")
    binding = sorted(
        (v for v in result.verdicts if slack(v) is not None and v.outcome == "met"), key=lambda v: slack(v) or 0.0
    )
    if binding:
        lines.append(f"tightest budget: {binding[0].sentence} ({slack(binding[0]):.0%} to spare)")
    return tuple(lines)


def slack(verdict: Verdict) -> float | None:
    """Return how far the figure is inside its limit, as a share of the limit; negative when beyond."""
    value = verdict.figure.value if verdict.figure else verdict.value.mid if verdict.value else None
    if value is None or not verdict.limit:
        return None
    return (1 - value / verdict.limit) * (1 if verdict.budget.bound == "max" else -1)


def rejections(
    results: Sequence[PlanResult], refused: Sequence[Rejection], infeasible: Mapping[str, int]
) -> tuple[Rejection, ...]:
    """Return what was not chosen: measured and beyond a budget, predicted beyond one, refused by a rule.

    Args:
        infeasible: budget label -> number of priced plans predicted to be beyond it.
    """
    out = []
    for result in results:
        beyond = [v.sentence for v in errors(result) if v.outcome == "not met"]
        if result.measurement and not failed(result) and beyond:
            out.append(Rejection(what=result.plan.words, why="; ".join(beyond), kind="measured"))
    causes = Counter(
        (r.measurement.failure.kind, r.measurement.failure.message)
        for r in results
        if r.measurement and r.measurement.failure
    )
    out += [
        Rejection(what=f"{kind} candidates", why=why, kind="failed", count=n) for (kind, why), n in causes.most_common()
    ]
    for label, count in sorted(infeasible.items(), key=lambda item: -item[1]):
        if count:
            out.append(Rejection(what="priced plans", why=f"predicted beyond {label}", kind="predicted", count=count))
    return (*out, *refused)


def nearest(results: Sequence[PlanResult], budgets: Sequence[Budget]) -> tuple[str, ...]:
    """Return, when nothing fits, each error budget's best achieved figure and the plan nearest to all of them."""
    lines = []
    usable = [r for r in results if not failed(r)]
    for budget in budgets:
        if budget.level != "error":
            continue
        scored = [(slack(v), r, v) for r in usable for v in r.verdicts if v.budget == budget and slack(v) is not None]
        if not scored:
            continue
        best = max(scored, key=lambda item: item[0] or 0.0)
        if best[2].outcome != "met":
            lines.append(f"{budget.label}: the best found is {best[2].sentence} ({best[1].plan.words})")
    shortfall = {r.plan: max((-(slack(v) or 0.0) for v in errors(r)), default=0.0) for r in usable}
    if shortfall:
        plan = min(shortfall, key=lambda p: shortfall[p])
        lines.append(f"nearest to all budgets: {plan.words}, short by {max(0.0, shortfall[plan]):.0%} on its worst")
    return tuple(lines)


# What each alternative is the least of: the first figure that every plan in question has.
_ALTERNATIVES = {
    "smallest": ("artefact_size", "peak_memory"),
    "fastest": ("latency_p50", "tpot_p50"),
    "closest to the original": ("kl_divergence", "quality_loss"),
}


def alternatives(answer: ParetoSet) -> dict[str, PlanResult]:
    """Return the plans a person may want instead of the recommended one, by what they are best at.

    They meet the budgets of level error where any plan does. The unchanged model is none of them: it is closest to itself.
    """
    changed = [r for r in answer.results if not failed(r) and r is not answer.baseline]
    field = [r for r in changed if r.feasible] or changed
    chosen = {}
    for name, labels in _ALTERNATIVES.items():
        for label in labels:
            values = [value_of(result, label) for result in field]
            if field and None not in values:
                chosen[name] = field[values.index(min(v for v in values if v is not None))]
                break
    return chosen


def price_with_and_without(plan: Plan, **setting: object) -> dict[Plan, Estimate]:
    """Return estimates of a plan and of the plan less each of its steps."""
    plans = [plan, *(replace(plan, steps=tuple(s for s in plan.steps if s != step)) for step in plan.steps)]
    return {p: cost_models.estimate(p, **setting) for p in plans}  # type: ignore[arg-type]
