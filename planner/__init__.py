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
    "replan": "planner.api",
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
    from knowledge_base.errors import LeanplanError as LeanplanError
    from knowledge_base.types import Budget as Budget
    from knowledge_base.types import Hardware as Hardware
    from knowledge_base.types import Model as Model
    from knowledge_base.types import Plan as Plan
    from knowledge_base.types import Step as Step
    from knowledge_base.types import Workload as Workload
    from planner.api import check as check
    from planner.api import estimate as estimate
    from planner.api import plan as plan
    from planner.api import replan as replan
    from planner.results import ParetoSet as ParetoSet
    from planner.results import PlanResult as PlanResult


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'planner' has no attribute {name!r}")
