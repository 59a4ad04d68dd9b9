"""Differences between plans, in words and with their direction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from knowledge_base.metrics import METRICS
from planner.reports.html._view import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How one metric moves from one plan to another. `good` is None where the difference is not worth a colour."""

    label: str
    text: str  # "−92 %", "8.2×", "+0.4 points"
    good: bool | None


def change(metric: str, before: float, after: float) -> Change | None:
    """Return the change of one metric, or None where it is too small to tell."""
    facts = METRICS[metric]
    if facts.dimension == "ratio":
        text = None if abs(after - before) < 0.0005 else f"{_signed(100 * (after - before))} points"
    elif not before or abs(after / before - 1) < 0.005:
        text = None
    elif after / before >= 2:
        text = f"{after / before:.3g}×"
    else:
        text = f"{_signed(100 * (after / before - 1))} %"
    if text is None:
        return None
    return Change(label=facts.label, text=text, good=(after < before) == (facts.better == "lower"))


def changes(before: Row, after: Row, metrics: Iterable[str]) -> list[Change]:
    """Return what changes from one plan to another, metric by metric."""
    both = [m for m in dict.fromkeys(metrics) if m in before.points and m in after.points]
    return [c for m in both if (c := change(m, before.points[m].value, after.points[m].value))]


def _signed(number: float) -> str:
    size = f"{abs(number):.0f}" if abs(number) >= 10 else f"{abs(number):.2g}"
    return f"{'−' if number < 0 else '+'}{size}"
