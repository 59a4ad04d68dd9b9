"""JUnit XML: a budget is a test case, and so is every metric that is worse than the lock."""

from __future__ import annotations

from knowledge_base.metrics import METRICS
from planner.checking import CheckResult, Stopped
from planner.reports.junit import Case, cases, suite

CHECK = "JUnit XML: not met is a failure, what could not be judged an error"


def render(check: CheckResult | Stopped) -> str:
    """Return a check as a JUnit test suite."""
    name = f"leanplan.{check.name}"
    if isinstance(check, Stopped):
        return suite(name, [Case("check", "error", check.headline, check.hint)])
    worse = [
        Case(f"{METRICS[r.metric].label} against the lock", "failure", r.sentence, r.outcome)
        for r in check.regressions
        if r.outcome == "worse"
    ]
    return suite(name, [*cases(check.verdicts), *worse])
