"""Budgets against figures: a verdict is statistical, never by the point estimate alone (promise P9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Budget, Estimate, Figure, Measurement, Value
from planner.results import Verdict
from search.limits import limit_of

WORDS = {  # (outcome, bound) -> what stands between figure and limit
    ("met", "max"): "is at most", ("met", "min"): "is at least",
    ("not met", "max"): "is more than", ("not met", "min"): "is less than",
    ("inconclusive", "max"): "cannot be told from", ("inconclusive", "min"): "cannot be told from",
}  # fmt: skip


CROWDED_CORES = 0.15  # of other programs, that spoil timings
FULL_RATIO = 0.75  # of the cores busy: a plan whose threads have others to go to is not held up


def crowding(measurement: Measurement) -> float | None:
    """Return the cores other programs kept busy while a plan was timed, where too few were left to it; else None.

    Threads that wait for each other stand still when one of them loses its core, so a plan can come out many times slower.
    """
    known = measurement.protocol
    other, cores = known.get("other_cores", 0.0), known.get("cores")
    if cores and other > CROWDED_CORES and known.get("own_cores", 0.0) + other > FULL_RATIO * cores:
        return float(other)
    return None


def judge(
    budgets: Sequence[Budget],
    *,
    baseline: Mapping[str, float],
    measurement: Measurement | None = None,
    estimate: Estimate | None = None,
    ratios: Mapping[str, Figure] | None = None,
) -> tuple[Verdict, ...]:
    """Return one verdict for each budget that is not off: by the measurement if there is one, else by the estimate.

    Args:
        baseline: the unchanged model's figures, for relative budgets.
        ratios: paired ratios to the unchanged model; where there is one, a relative budget is judged by it.
    """
    verdicts = []
    for budget in budgets:
        if budget.level == "off":
            continue
        limit = limit_of(budget, baseline)
        if budget.relative and ratios and budget.metric in ratios:
            verdicts.append(_of_ratio(budget, ratios[budget.metric]))
        elif measurement is not None:
            verdicts.append(_of_figure(budget, limit, measurement.figures.get(budget.metric)))
        else:
            verdicts.append(_of_value(budget, limit, estimate.values.get(budget.metric) if estimate else None))
    other = crowding(measurement) if measurement else None
    return tuple(in_a_crowd(_steady(verdict, measurement), other) for verdict in verdicts)


def _steady(verdict: Verdict, measurement: Measurement | None) -> Verdict:
    """Return a verdict; where a time limit was kept while the queue before the service grew, that nothing can be told."""
    load = measurement.protocol.get("load", {}) if measurement else {}
    if verdict.outcome != "met" or load.get("steady", True) or not timed(verdict.budget.metric):
        return verdict
    return replace(verdict, outcome="inconclusive", sentence=f"{verdict.sentence}, but arrivals outran the service")


def timed(metric: str) -> bool:
    """Whether a figure follows from how long requests took: what other programs can spoil."""
    return METRICS[metric].sampled or METRICS[metric].resource in ("energy", "money")


def in_a_crowd(verdict: Verdict, other_cores: float | None) -> Verdict:
    """Return a verdict; where a time limit was missed while other programs left too few cores, that nothing can be told."""
    if verdict.outcome != "not met" or other_cores is None or not timed(verdict.budget.metric):
        return verdict
    return replace(
        verdict, outcome="inconclusive",
        sentence=f"{verdict.sentence}, but other programs kept {other_cores:.1f} cores busy meanwhile",
    )  # fmt: skip


def _of_figure(budget: Budget, limit: float | None, figure: Figure | None) -> Verdict:
    if limit is None or figure is None:
        missing = "figure of the unchanged model to compare with" if limit is None else "figure of this plan"
        return Verdict(
            budget=budget,
            outcome="not judged",
            limit=limit or 0.0,
            figure=figure,
            sentence=f"{budget.label}: no {missing}",
        )
    if figure.source != "measured" and budget.source != "any":
        return Verdict(
            budget=budget, outcome="not judged", limit=limit, figure=figure,
            sentence=f"{budget.label} is only {figure.source} here; allow it with source: any",
        )  # fmt: skip
    statistics = _statistics()
    value = statistics.point(figure, budget.statistic)
    low, high = statistics.bounds_of(figure, budget.statistic)
    if value is None or (low is None and high is None):
        return Verdict(
            budget=budget, outcome="inconclusive", limit=limit, figure=figure,
            sentence=f"{budget.label}: {figure.n} samples are too few for a {budget.statistic}",
        )  # fmt: skip
    verdict = statistics.judge(figure, limit, budget.bound, budget.statistic)
    return Verdict(
        budget=budget,
        outcome=verdict,
        limit=limit,
        figure=figure,
        sentence=_sentence(budget, verdict, value, low, high, limit),
    )


def _of_ratio(budget: Budget, ratio: Figure) -> Verdict:
    """Judge a relative budget by a paired ratio: what the machine did meanwhile cancels in it."""
    verdict = _statistics().judge(ratio, budget.value, budget.bound)
    interval = f"[{ratio.low:.3g}, {ratio.high:.3g}]"
    text = f"{budget.label} {ratio.value:.3g}x baseline {interval} {WORDS[verdict, budget.bound]} {budget.value:.3g}x"
    return Verdict(budget=budget, outcome=verdict, limit=budget.value, figure=ratio, sentence=text)


def _statistics():  # type: ignore[no-untyped-def]
    from planner import statistics  # needs numpy; judging predictions must not

    return statistics


def _of_value(budget: Budget, limit: float | None, value: Value | None) -> Verdict:
    if limit is None or value is None:
        return Verdict(
            budget=budget, outcome="not judged", limit=limit or 0.0, value=value,
            sentence=f"{budget.label} cannot be predicted; only measuring tells",
        )  # fmt: skip
    mid = value.p95 if budget.statistic in ("p95", "p99") and value.p95 is not None else value.mid  # p99: at least
    within = mid <= limit if budget.bound == "max" else mid >= limit
    verdict = "met" if within else "not met"
    low, high = (mid * end / value.mid if value.mid else end for end in (value.low, value.high))
    return Verdict(
        budget=budget, outcome=verdict, limit=limit, value=value,
        sentence="predicted " + _sentence(budget, verdict, mid, low, high, limit),
    )  # fmt: skip


def _sentence(budget: Budget, verdict: str, value: float, low: float | None, high: float | None, limit: float) -> str:
    def show(x: float | None) -> str:
        return "?" if x is None else units.format(x, METRICS[budget.metric].dimension)

    ends = [show(low), show(high)]
    interval = f" [{', '.join(ends)}]" if ends != [show(value)] * 2 else ""
    return f"{budget.label} {show(value)}{interval} {WORDS[verdict, budget.bound]} {show(limit)}"
