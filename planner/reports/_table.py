"""The one table behind every report: which metrics are columns, and how a cell reads."""

from __future__ import annotations

from knowledge_base import units
from knowledge_base.metrics import METRICS, find_metric
from knowledge_base.types import Figure, Value
from planner.results import ParetoSet, PlanResult

MARKS = {"met": "✓", "not met": "✗", "inconclusive": "?", "not judged": "–"}


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


def mark(result: PlanResult, answer: ParetoSet) -> str:
    """Return what a plan is: recommended, on the front, the baseline, failed."""
    if result.plan.id == answer.recommended_id:
        return "★"
    if result.measurement and result.measurement.failure:
        return "×"
    return "●" if result.on_front else "○"


def ordered(answer: ParetoSet) -> list[PlanResult]:
    """Return the results worth showing: recommended, front, baseline, then the rest that has figures."""
    shown = [r for r in answer.results if not (r.measurement and r.measurement.failure)]
    rank = {id(answer.baseline): 2}
    return sorted(
        shown, key=lambda r: 0 if r.plan.id == answer.recommended_id else 1 if r.on_front else rank.get(id(r), 3)
    )
