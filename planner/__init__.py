"""Fit a language model to your budgets.

    from planner import plan, Budget
    answer = plan("models/tiny-lm", budgets={"peak_memory": "1 GiB", "quality_loss": "5 %"})
    print(answer.recommended.plan.words)

Names load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "plan": "planner.api",
    "estimate": "planner.api",
    "check": "planner.api",
    "Budget": "knowledge_base.types",
    "Model": "knowledge_base.types",
    "Workload": "knowledge_base.types",
    "Hardware": "knowledge_base.types",
    "Plan": "knowledge_base.types",
    "Step": "knowledge_base.types",
    "ParetoSet": "planner.results",
    "PlanResult": "planner.results",
    "LeanplanError": "knowledge_base.errors",
}
__all__ = list(_HOMES)

if TYPE_CHECKING:
    from knowledge_base.errors import LeanplanError
    from knowledge_base.types import Budget, Hardware, Model, Plan, Step, Workload
    from planner.api import check, estimate, plan
    from planner.results import ParetoSet, PlanResult


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'planner' has no attribute {name!r}")
