"""The headline, and a line for each budget that is not met."""

from __future__ import annotations

from planner.checking import CheckResult
from planner.reports._text import literal

CHECK = "the headline and what is not met"


def render(check: CheckResult) -> str:
    """Return the headline and the verdicts that are not `met`."""
    rest = [f"{v.outcome}: {v.sentence}" for v in check.verdicts if v.outcome != "met"]
    return "\n".join(literal(line) for line in [check.headline, *rest])
