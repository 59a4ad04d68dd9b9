"""One search problem, and plans with their predicted prices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import cost_models
from knowledge_base.metrics import METRICS, find_metric
from knowledge_base.types import Budget, Hardware, Model, Plan, Workload
from search.limits import binding, limit_of, violation
from search.space import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What to search: legal plans, budgets as constraints, objectives, and what has been learned so far.

    `baseline` holds the unchanged model's measured figures (metric name -> value); before it was measured it is
    empty and relative budgets use the predicted baseline.
    """

    model: Model
    workload: Workload
    hardware: Hardware
    space: Space
    budgets: tuple[Budget, ...]
    objectives: tuple[str, ...]  # labels, by priority
    baseline: Mapping[str, float] = field(default_factory=dict)
    calibration: Any = None

    @property
    def objective_metrics(self) -> tuple[str, ...]:
        """The objectives' metric names that can be predicted; perplexity-like ones are predicted as quality loss."""
        return tuple(dict.fromkeys(_predictable(find_metric(label)[0].name) for label in self.objectives))

    def price(self, plans: Sequence[Plan]) -> Priced:
        """Return the plans with predicted figures of every metric."""
        figures = cost_models.estimate_many(plans, self.model, self.workload, self.hardware, self.calibration)
        return Priced(problem=self, plans=tuple(plans), figures=figures)


def _predictable(metric: str) -> str:
    """Return the metric that stands for one only measurement can tell."""
    return "quality_loss_ratio" if METRICS[metric].resource == "quality" else metric


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """Plans and their predictions: `figures[metric]` has arrays mid, low, high and perhaps p95 of shape (plans,)."""

    problem: Problem
    plans: tuple[Plan, ...]
    figures: Mapping[str, Any]

    def costs(self, which: str = "mid") -> np.ndarray:
        """Return (plans, objectives) with every objective turned so that smaller is better.

        `which`: "mid", or "best" for the optimistic end of each interval.
        """
        columns = []
        for name in self.problem.objective_metrics:
            lower_is_better = METRICS[name].better == "lower"
            end = {"mid": "mid", "best": "low" if lower_is_better else "high"}[which]
            values = getattr(self.figures[name], end)
            columns.append(values if lower_is_better else -values)
        return np.stack(columns, axis=1)

    def violations(self, which: str = "mid") -> np.ndarray:
        """Return (plans,): the worst violation of the error budgets; <= 0 where all are met.

        `which`: "mid", or "best" for the optimistic end: above 0 there means the plan has no chance.
        """
        worst = np.full(len(self.plans), -np.inf)
        for budget in binding(self.problem.budgets):
            if (column := self.violation(budget, which)) is not None:
                worst = np.maximum(worst, column)
        return np.where(np.isneginf(worst), 0.0, worst)

    def violation(self, budget: Budget, which: str = "mid") -> np.ndarray | None:
        """Return (plans,): one budget's violation, or None when its metric cannot be predicted."""
        if budget.metric not in self.figures:
            return None
        end = {"mid": "mid", "best": "low" if budget.bound == "max" else "high"}[which]
        figures = self.figures[budget.metric]
        if budget.statistic in ("p95", "p99") and figures.p95 is not None and which == "mid":
            end = "p95"
        return violation(budget, getattr(figures, end), self._reference())

    def _reference(self) -> Mapping[str, float]:
        if self.problem.baseline or not any(b.relative for b in self.problem.budgets):
            return self.problem.baseline
        return self.problem_baseline()

    def problem_baseline(self) -> dict[str, float]:
        """Return the predicted figures of the unchanged model, for relative budgets before it was measured."""
        problem = self.problem
        plan = problem.space.unchanged()
        figures = cost_models.estimate_many(
            [plan], problem.model, problem.workload, problem.hardware, problem.calibration
        )
        return {name: float(values.mid[0]) for name, values in figures.items()}

    def limits(self) -> dict[str, float | None]:
        """Return each error budget's bound in SI units, by label."""
        return {b.label: limit_of(b, self._reference()) for b in binding(self.problem.budgets)}

    def take(self, indices: np.ndarray) -> Priced:
        """Return some of the plans, with their figures."""
        figures = {
            name: replace(
                v,
                mid=v.mid[indices],
                low=v.low[indices],
                high=v.high[indices],
                p95=None if v.p95 is None else v.p95[indices],
            )
            for name, v in self.figures.items()
        }
        return Priced(problem=self.problem, plans=tuple(self.plans[i] for i in indices), figures=figures)
