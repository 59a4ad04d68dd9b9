"""Budgets as numbers a solver understands: a violation is <= 0 when the budget is met (Optuna's sign)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from knowledge_base.types import Budget


def limit_of(budget: Budget, baseline: Mapping[str, float]) -> float | None:
    """Return the budget's bound in SI units; None when it is relative and the baseline's figure is unknown."""
    if not budget.relative:
        return budget.value
    reference = baseline.get(budget.metric)
    return None if reference is None else budget.value * reference


def violation(budget: Budget, value: Any, baseline: Mapping[str, float]) -> Any:
    """Return how far `value` (float or array) is beyond the budget, as a share of the limit; <= 0 when met.

    Unknown limits give 0: what cannot be judged before measuring does not steer the search.
    """
    limit = limit_of(budget, baseline)
    if limit is None:
        return 0.0 * value
    scale = abs(limit) or 1.0
    return (value - limit) / scale if budget.bound == "max" else (limit - value) / scale


def binding(budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    """Return the budgets a plan must meet: level error."""
    return tuple(b for b in budgets if b.level == "error")
