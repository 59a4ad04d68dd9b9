"""Part 3: parallel coordinates: a line for each plan, a column for each metric, better always upwards."""

from __future__ import annotations

from typing import Any

from knowledge_base import units
from knowledge_base.metrics import METRICS
from planner.reports.html._view import Row, View

TITLE = "Every plan, every metric"
LEAD = "One line for each plan; up is better on every axis. A line through a shaded stretch breaks that budget."
MOST_AXES = 8


def facts(view: View) -> dict[str, Any]:
    """Return axes and lines, in per cent of the plot from its top left corner."""
    names = [n for n in view.columns if len({row.points[n].value for row in view.shown if n in row.points}) > 1]
    names = names[:MOST_AXES]
    if len(names) < 2:
        return {"axes": [], "lines": [], "legend": []}
    places = {name: round(100 * (i + 0.5) / len(names), 3) for i, name in enumerate(names)}
    rest = [row for row in view.shown if row.kind not in ("recommended", "baseline")]
    last = [row for row in view.shown if row.kind in ("baseline", "recommended")]  # drawn on top of the others
    return {
        "axes": [_axis(view, name, places[name]) for name in names],
        "lines": [{"row": row, "path": _path(view, row, places)} for row in [*rest[::-1], *last[::-1]]],
        "legend": view.legend(view.shown),
    }


def _down(view: View, name: str, value: float) -> float:
    """Return how far from the top a value stands."""
    at = max(0.0, min(1.0, view.axes[name].at(value)))
    return round(100 * (at if METRICS[name].better == "lower" else 1 - at), 2)


def _axis(view: View, name: str, place: float) -> dict[str, Any]:
    axis, metric = view.axes[name], METRICS[name]
    ends = [row.points[name].value for row in view.shown if name in row.points]
    best, worst = (min(ends), max(ends)) if metric.better == "lower" else (max(ends), min(ends))
    cut = None
    if name in view.limits:
        limit, bound, text = view.limits[name]
        at = axis.at(limit)
        if 0 < at < 1:
            down = _down(view, name, limit)
            upward = (bound == "max") == (metric.better == "lower")  # what is within the limit lies above it
            cut = {"at": down, "text": text, "from": down if upward else 0, "height": 100 - down if upward else down}
    return {
        "label": metric.label, "summary": metric.summary, "at": place, "cut": cut,
        "best": units.format(best, metric.dimension), "worst": units.format(worst, metric.dimension),
        "best_at": _down(view, name, best), "worst_at": _down(view, name, worst),
    }  # fmt: skip


def _path(view: View, row: Row, places: dict[str, float]) -> str:
    """Return the line as an SVG path; a metric the plan has no figure for breaks it."""
    parts, joined = [], False
    for name, place in places.items():
        if name in row.points:
            parts.append(f"{'L' if joined else 'M'}{place:g} {_down(view, name, row.points[name].value):g}")
        joined = name in row.points
    return " ".join(parts)
