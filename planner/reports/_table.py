"""The one table behind every report: which metrics are columns, and how a cell reads."""

from __future__ import annotations

from typing import NamedTuple

from knowledge_base import units
from knowledge_base.metrics import METRICS, find_metric
from knowledge_base.types import Figure, Value
from planner import run_forecast
from planner.answering import alternatives
from planner.results import ParetoSet, PlanResult
from planner.run_forecast import RunForecast

MARKS = {"met": "✓", "not met": "✗", "inconclusive": "?", "not judged": "–"}


class Kind(NamedTuple):
    """What a plan is in an answer: its mark, the same in every report, and the words of the legend."""

    mark: str
    words: str


KINDS = {
    "recommended": Kind("◆", "recommended"),
    "baseline": Kind("★", "the model as it came"),
    "front": Kind("●", "on the Pareto front"),
    "dominated": Kind("·", "within the budgets, but another plan is better"),
    "undecided": Kind("▲", "cannot be told from a limit"),
    "infeasible": Kind("×", "beyond a budget"),
    "failed": Kind("■", "failed"),
}


def columns(result: ParetoSet) -> tuple[str, ...]:
    """Return the metric names worth a column: objectives, then budgets, then the usual ones, each once."""
    usual: tuple[str, ...] = (
        "ttft_s",
        "tpot_s",
        "throughput_tokens_per_s",
        "peak_memory_bytes",
        "artefact_bytes",
        "quality_loss_ratio",
    )
    if result.measured:
        usual += ("agreement_ratio", "kl_divergence_nats")
    wanted = [find_metric(label)[0].name for label in result.objectives] + [b.metric for b in result.budgets]
    return tuple(dict.fromkeys([*wanted, *usual]))


def label(metric: str) -> str:
    """Return a metric's label; a metric this version does not know keeps its name."""
    return METRICS[metric].label if metric in METRICS else metric


def heading(metric: str) -> str:
    """Return a metric's column heading, with its direction."""
    return f"{METRICS[metric].label} {'↓' if METRICS[metric].better == 'lower' else '↑'}"


def cell(result: PlanResult, metric: str, *, measured: bool) -> str:
    """Return one figure as text: `41.2 ms ±0.8`, `[38, 45]` for predictions, `modelled` said where it is."""
    verdict = next((v for v in result.verdicts if v.budget.metric == metric), None)
    mark = f" {MARKS[verdict.outcome]}" if verdict else ""
    if measured:
        figure = result.measurement.figures.get(metric) if result.measurement else None
        return (figure_text(figure, metric) + mark) if figure else "–"
    value = result.estimate.values.get(metric) if result.estimate else None
    return (value_text(value, metric) + mark) if value else "–"


def figure_text(figure: Figure, metric: str) -> str:
    """Return a measured figure with half its confidence interval."""
    dimension = METRICS[metric].dimension
    text = units.format(figure.value, dimension)
    half = (figure.high - figure.low) / 2
    if figure.value and half / abs(figure.value) >= 0.0005:
        share = half / abs(figure.value)
        text += f" ±{share:.1%}" if share < 1 else f" ±{units.format(half, dimension)}"
    return text if figure.source == "measured" else f"{text} ({figure.source})"


def value_text(value: Value, metric: str) -> str:
    """Return a predicted value with its interval."""
    dimension = METRICS[metric].dimension
    low, high = units.format(value.low, dimension), units.format(value.high, dimension)
    return f"{units.format(value.mid, dimension)} [{low} – {high}]"


def kind(result: PlanResult, answer: ParetoSet | None = None) -> str:
    """Return which of KINDS a plan is; before there is an answer, none is recommended yet."""
    if result.measurement and result.measurement.failure:
        return "failed"
    if answer and result.plan.id == answer.recommended_id:
        return "recommended"
    if answer and result is answer.baseline:
        return "baseline"
    if result.feasible:
        return "front" if result.on_front else "dominated"
    beyond = any(v.outcome == "not met" for v in result.verdicts if v.budget.level == "error")
    return "infeasible" if beyond else "undecided"


def mark(result: PlanResult, answer: ParetoSet) -> str:
    """Return the mark of what a plan is."""
    return KINDS[kind(result, answer)].mark


def legend(answer: ParetoSet) -> tuple[list[str], list[str]]:
    """Return what the marks of the plans, and those of the budgets, in an answer's table mean: `◆ recommended`."""
    there = {kind(result, answer) for result in ordered(answer)}
    judged = ["✓ budget met", "✗ not met", "? cannot be told"] if answer.budgets else []
    return [f"{k.mark} {k.words}" for name, k in KINDS.items() if name in there], judged


def named(answer: ParetoSet) -> list[tuple[str, PlanResult]]:
    """Return the alternatives to the recommended plan, one for each plan, under all its names: `smallest, fastest`."""
    names: dict[str, list[str]] = {}
    results = {}
    for name, result in alternatives(answer).items():
        names.setdefault(result.plan.id, []).append(name)
        results[result.plan.id] = result
    return [(", ".join(found), results[plan]) for plan, found in names.items()]


def foretold(answer: ParetoSet, result: PlanResult) -> list[tuple[str, Value]]:
    """Return what is predicted of an unmeasured plan by each objective that can be predicted."""
    names = dict.fromkeys(find_metric(label)[0].name for label in answer.objectives)
    values = result.estimate.values if result.estimate else {}
    return [(name, values[name]) for name in names if name in values]


def forecast_lines(forecast: RunForecast) -> tuple[str, list[str]]:
    """Return a heading and a line for each amount of a run: what it was expected to take, and what it took."""
    lines = run_forecast.rows(forecast)
    if all(a.fact is None for a in forecast.amounts.values()):
        return "Measuring them is expected to take", [f"{r.label}: {r.forecast}" for r in lines]
    return "The run's forecast against what it took", [
        f"{r.label}: {r.forecast}, took {r.fact}: {r.held}"
        if r.fact != "–"
        else f"{r.label}: {r.forecast}, not observed"
        for r in lines
    ]


def ordered(answer: ParetoSet) -> list[PlanResult]:
    """Return the results worth showing: recommended, front, baseline, then the rest that has figures."""
    shown = [r for r in answer.results if not (r.measurement and r.measurement.failure)]
    rank = {id(answer.baseline): 2}
    return sorted(
        shown, key=lambda r: 0 if r.plan.id == answer.recommended_id else 1 if r.on_front else rank.get(id(r), 3)
    )
