"""Part 2: every plan on two metrics at once. Drawn in shares of the plot, so that it fits any width."""

from __future__ import annotations

from typing import Any

from knowledge_base.metrics import METRICS
from planner.reports import _table
from planner.reports.html._view import Row, View

TITLE = "What you can have"
LEAD = "Each mark is a plan. No plan within the budgets lies beyond the stepped line: on it are the best trade-offs."


def facts(view: View) -> dict[str, Any]:
    """Return the plot of the first two objectives, and the table of all plans."""
    names = list(dict.fromkeys([*view.objectives, *view.metrics]))
    names = [n for n in names if n in view.metrics]
    plot = _plot(view, names[0], names[1]) if len(names) > 1 else None
    return {
        "plot": plot,
        "choices": [(n, METRICS[n].label) for n in view.metrics],
        "legend": view.legend(view.rows),
        "headings": [_table.heading(n) for n in view.columns],
        "lines": [_line(view, row) for row in view.rows],
    }


def _plot(view: View, across: str, up: str) -> dict[str, Any]:
    """Return marks, error bars, limits and the front, in per cent from the lower left corner."""
    x_axis, y_axis = view.axes[across], view.axes[up]
    marks: list[dict[str, Any]] = []
    for row in view.shown:
        if across not in row.points or up not in row.points:
            continue
        p, q = row.points[across], row.points[up]
        marks.append(
            {
                "row": row, "x": _per_cent(x_axis.at(p.value)), "y": _per_cent(y_axis.at(q.value)),
                "x_low": _clip(x_axis.at(p.low)), "x_high": _clip(x_axis.at(p.high)),
                "y_low": _clip(y_axis.at(q.low)), "y_high": _clip(y_axis.at(q.high)),
                "hollow": not (p.observed and q.observed), "title": f"{row.words}\n{p.text}, {q.text}\n{row.role}",
            }
        )  # fmt: skip
    return {
        "marks": marks, "across": _side(view, across), "up": _side(view, up),
        "front": _stairs(_front([m for m in marks if m["row"].result.feasible], METRICS[across].better, METRICS[up].better), METRICS[across].better, METRICS[up].better),
    }  # fmt: skip


def _side(view: View, name: str) -> dict[str, Any]:
    axis = view.axes[name]
    limit = None
    if name in view.limits:
        value, bound, text = view.limits[name]
        at = axis.at(value)
        inside = 0 <= at <= 1
        share = _clip(at)
        # The feasible side is shaded: below a max, above a min. A limit off the axis shades all or nothing.
        limit = {"at": share, "bound": bound, "text": text, "inside": inside,
                 "from": 0 if bound == "max" else share, "to": share if bound == "max" else 100}  # fmt: skip
    better = METRICS[name].better
    return {
        "name": name, "label": METRICS[name].label, "summary": METRICS[name].summary, "better": better, "log": axis.log,
        "ticks": [(_per_cent(at), text) for at, text in axis.ticks()], "limit": limit,
    }  # fmt: skip


def _front(marks: list[dict[str, Any]], across: str, up: str) -> list[tuple[float, float]]:
    """Return the undominated marks of these two metrics, from left to right."""
    toward_x, toward_y = (1 if across == "lower" else -1), (1 if up == "lower" else -1)
    front: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda m: (toward_x * m["x"], toward_y * m["y"])):
        if not front or toward_y * mark["y"] < toward_y * front[-1][1]:
            front.append((mark["x"], mark["y"]))
    return front


def _stairs(front: list[tuple[float, float]], across: str, up: str) -> str:
    """Return the edge of what can be had as an SVG path: steps through the front, out to the worse ends of both axes."""
    if not front:
        return ""
    worst_x, worst_y = (100 if across == "lower" else 0), (0 if up == "lower" else 100)
    steps = "".join(f"H{x:g}V{round(100 - y, 2):g}" for x, y in front[1:])
    return f"M{front[0][0]:g} {worst_y}V{round(100 - front[0][1], 2):g}{steps}H{worst_x}"


def _line(view: View, row: Row) -> dict[str, Any]:
    failure = row.result.measurement.failure if row.result.measurement else None
    return {
        "row": row,
        "cells": [_table.cell(row.result, n, measured=view.answer.measured) for n in view.columns],
        "failure": f"failed, {failure.kind}: {failure.message}" if failure else "",
    }


def _per_cent(share: float) -> float:
    return round(100 * share, 2)


def _clip(share: float) -> float:
    return _per_cent(max(0.0, min(1.0, share)))
