"""Every budget, what changed against the lock, and the notes, for people."""

from __future__ import annotations

from planner.checking import CheckResult
from planner.reports._table import MARKS
from planner.reports._text import literal

CHECK = "everything, for people"


def render(check: CheckResult) -> str:
    """Return the headline, a line for each budget, a line for each metric compared, and the notes."""
    lines = [check.headline, "", f"plan {check.plan.id}: {check.plan.words}"]
    for verdict in check.verdicts:
        warn = "  (warn)" if verdict.budget.level == "warn" else ""
        lines.append(f"  {MARKS[verdict.outcome]} {verdict.sentence}{warn}")
    if shown := [r for r in check.regressions if r.outcome != "not compared"]:
        lines += ["against the lock:", *(f"  {r.outcome:7} {r.sentence}" for r in shown)]
    lines += [f"changed: {c}" for c in check.changes]
    return "\n".join(literal(line) for line in [*lines, *(f"note: {n}" for n in check.notes)])
