"""What every part looks at: the plans in order, their points on each metric's axis, and what each plan is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from knowledge_base import units
from knowledge_base.metrics import METRICS, find_metric
from planner.cli._talk import clean
from planner.reports import _table
from planner.reports.html._axes import Axis
from planner.results import ParetoSet, PlanResult, Verdict
from search.limits import limit_of

FAR = 4.0  # a limit further away than this many times the figures' range is told, not drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One figure of one plan: its number, interval and text, and whether it was measured, modelled or predicted."""

    value: float
    low: float
    high: float
    text: str
    source: str

    @property
    def observed(self) -> bool:
        return self.source == "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One plan as the report shows it. `points`: what the answer rests on; `predicted`: what was expected before."""

    result: PlanResult
    kind: str
    points: Mapping[str, Point]
    predicted: Mapping[str, Point]

    @property
    def id(self) -> str:
        return self.result.plan.id

    @property
    def words(self) -> str:
        return self.result.plan.words

    @property
    def role(self) -> str:
        return _table.KINDS[self.kind].words


class View:
    """An answer, prepared for showing. `rows`: recommended first, then the front, the unchanged model, the rest."""

    def __init__(self, answer: ParetoSet, rows: tuple[Row, ...]) -> None:
        self.answer, self.rows = answer, rows

    @classmethod
    def of(cls, answer: ParetoSet) -> View:
        failed = [r for r in answer.results if r.measurement and r.measurement.failure]
        rows = [
            Row(result=r, kind=_table.kind(r, answer), points=_points(r, answer.measured), predicted=_predicted(r))
            for r in [*_table.ordered(answer), *failed]
        ]
        return cls(answer, tuple(rows))

    @property
    def kind_of_figures(self) -> str:
        return "measured" if self.answer.measured else "predicted"

    @property
    def machine(self) -> str:
        """The machine as a person would name it."""
        hardware = self.answer.hardware
        cores = hardware.device.cores
        return (
            hardware.name if hardware.name != "local" else hardware.device.name + (f", {cores} cores" if cores else "")
        )

    @cached_property
    def shown(self) -> tuple[Row, ...]:
        """The plans that have figures."""
        return tuple(r for r in self.rows if r.points)

    def legend(self, rows: Iterable[Row]) -> list[tuple[str, str]]:
        """Return (kind, words) of what these plans are."""
        there = {row.kind for row in rows}
        return [(name, kind.words) for name, kind in _table.KINDS.items() if name in there]

    @cached_property
    def recommended(self) -> Row | None:
        return next((r for r in self.rows if r.id == self.answer.recommended_id), None)

    @cached_property
    def baseline(self) -> Row | None:
        first = self.answer.baseline
        return next((r for r in self.rows if first and r.result is first), None)

    @cached_property
    def front(self) -> tuple[Row, ...]:
        """The Pareto front, recommended first."""
        return tuple(r for r in self.rows if r.result.on_front)

    @cached_property
    def objectives(self) -> tuple[str, ...]:
        """The metrics that are to be made best, in order."""
        return tuple(dict.fromkeys(find_metric(o)[0].name for o in self.answer.objectives))

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Every metric some plan has a figure for: objectives, budgets, the usual ones, then the rest."""
        have = {name for row in self.shown for name in row.points}
        return tuple(n for n in dict.fromkeys([*_table.columns(self.answer), *METRICS]) if n in have)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The metrics worth a column of a table."""
        return tuple(n for n in _table.columns(self.answer) if n in self.metrics)

    @cached_property
    def limits(self) -> Mapping[str, tuple[float, str, str]]:
        """Metric -> (limit in its own unit, "max" or "min", text) of each budget that can be put on its axis."""
        reference = {n: p.value for n, p in self.baseline.points.items()} if self.baseline else {}
        found = {}
        for budget in self.answer.budgets:
            limit = limit_of(budget, reference)
            if budget.level == "off" or limit is None or budget.metric not in METRICS:
                continue
            sign = "≤" if budget.bound == "max" else "≥"
            text = f"{sign} {units.format(limit, METRICS[budget.metric].dimension)}"
            found[budget.metric] = (limit, budget.bound, text)
        return found

    @cached_property
    def axes(self) -> Mapping[str, Axis]:
        """One axis for each metric, holding every point and, where it is not far off, the limit."""
        axes = {}
        for name in self.metrics:
            points = [row.points[name] for row in self.shown if name in row.points]
            values = [v for p in points for v in ((p.value, p.low, p.high) if p.observed else (p.value,))]
            low, high = min(values), max(values)
            if name in self.limits:
                limit = self.limits[name][0]
                reach = FAR * (high - low) or FAR * abs(high)
                if low - reach <= limit <= high + reach:
                    values.append(limit)
            axes[name] = Axis.of(name, values)
        return axes

    def data(self) -> dict[str, Any]:
        """Return every figure: in words and as shares of an axis, for the script, and as numbers, for whoever reads them."""
        metrics = []
        for name in self.metrics:
            axis = self.axes[name]
            limit, bound, text = self.limits.get(name, (None, "", ""))
            metrics.append(
                {
                    "name": name, "label": METRICS[name].label, "unit": units.DIMENSIONS[METRICS[name].dimension].base, "better": METRICS[name].better, "log": axis.log,
                    "ticks": axis.ticks(), "limit": None if limit is None else [axis.at(limit), bound, text],
                }
            )  # fmt: skip
        plans = [
            {
                "id": row.id, "words": clean(row.words), "kind": row.kind, "role": row.role,
                "feasible": row.result.feasible,
                "at": [self._share(row.points, name) for name in self.metrics],
                "was": [self._share(row.predicted, name) for name in self.metrics],
            }
            for row in self.rows
        ]  # fmt: skip
        return {"metrics": metrics, "plans": plans, "measured": self.answer.measured}

    def _share(self, points: Mapping[str, Point], name: str) -> list[Any] | None:
        if name not in points:
            return None
        axis, p = self.axes[name], points[name]
        return [
            axis.at(p.value),
            axis.at(p.low),
            axis.at(p.high),
            p.text,
            p.source,
            *map(float, (p.value, p.low, p.high)),
        ]


def of_ratio(verdict: Verdict) -> bool:
    """Whether a verdict was judged by the paired ratio to the unchanged model, in which case its limit is one too."""
    return verdict.budget.relative and verdict.figure is not None and verdict.limit == verdict.budget.value


def _points(result: PlanResult, measured: bool) -> dict[str, Point]:
    if not measured:
        return _predicted(result)
    if result.measurement is None or result.measurement.failure:
        return {}
    return {
        name: Point(value=f.value, low=f.low, high=f.high, text=_table.figure_text(f, name), source=f.source)
        for name, f in result.measurement.figures.items()
        if name in METRICS
    }


def _predicted(result: PlanResult) -> dict[str, Point]:
    if result.estimate is None:
        return {}
    return {
        name: Point(value=v.mid, low=v.low, high=v.high, text=_table.value_text(v, name), source="predicted")
        for name, v in result.estimate.values.items()
        if name in METRICS
    }
