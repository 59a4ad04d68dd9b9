"""Part 9: what was not tried or not chosen, and why."""

from __future__ import annotations

from typing import Any

from planner.reports.html._view import View
from planner.results import Rejection

TITLE = "What was not chosen, and why"
LEAD = "From every plan that could be written down to the ones that were measured."
KINDS = {
    "rule": "Ruled out by what is known",
    "engine": "Engines that cannot run here",
    "predicted": "Predicted to be beyond a budget",
    "failed": "Failed while being measured",
    "measured": "Measured, and beyond a budget",
}


def facts(view: View) -> dict[str, Any]:
    """Return the narrowing from legal plans to the recommended one, and the reasons by kind."""
    search = view.answer.search
    groups: dict[str, list[Rejection]] = {}
    for rejection in view.answer.rejected:
        groups.setdefault(rejection.kind, []).append(rejection)
    stages = [
        ("could be composed, at most", search.get("legal_at_most")),
        ("priced", search.get("priced") or None),  # a check prices none
        ("measured" if view.answer.measured else "shown", len(view.answer.results)),
        ("within every budget", sum(r.feasible and bool(r.verdicts) for r in view.answer.results)),
        ("on the Pareto front", len(view.front)),
    ]
    return {
        "stages": [(words, f"{n:,}") for words, n in stages if isinstance(n, int)],
        "groups": [(KINDS.get(kind, kind), found) for kind, found in sorted(groups.items(), key=_order)],
        "untold": max(0, int(search.get("priced") or 0) - len(view.answer.results)),
    }


def _order(group: tuple[str, list[Rejection]]) -> int:
    return list(KINDS).index(group[0]) if group[0] in KINDS else len(KINDS)
