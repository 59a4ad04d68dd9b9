"""A check as one JSON object; `leanplan schema --of check` describes it."""

from __future__ import annotations

import json
from typing import Any

from knowledge_base.serde import plain
from knowledge_base.types import Plan
from planner.checking import CheckResult, Regression
from planner.results import PlanResult, Verdict

CHECK = "one JSON object; its schema: leanplan schema --of check"

FIELDS: dict[str, Any] = {
    "schema": int, "name": str, "headline": str, "exit_code": int, "measured": bool, "plan_id": str, "plan": Plan,
    "verdicts": tuple[Verdict, ...], "regressions": tuple[Regression, ...], "changes": tuple[str, ...],
    "notes": tuple[str, ...], "fix": PlanResult | None,
}  # fmt: skip


def summary(check: CheckResult) -> dict[str, Any]:
    """Return the facts of a check, by the names of FIELDS."""
    more = {"schema": 1, "exit_code": int(check.exit_code), "plan_id": check.plan.id}
    return {name: more[name] if name in more else getattr(check, name) for name in FIELDS}


def render(check: CheckResult) -> str:
    """Return the facts of a check as JSON."""
    return json.dumps(plain(summary(check)), indent=1, allow_nan=False, ensure_ascii=False)
