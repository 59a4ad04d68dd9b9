"""Part 7: what was predicted before each plan was measured, against what was then measured."""

from __future__ import annotations

import math
from typing import Any

from knowledge_base.metrics import METRICS
from planner.reports.html._view import View

TITLE = "Predicted against measured"
LEAD = "Each mark is a plan: measured ÷ predicted. A filled dot lay inside its predicted interval, a cross outside."
REACH = (1.25, 1.5, 2, 3, 4, 8)  # how many times too low or too high the scale shows


def facts(view: View) -> dict[str, Any]:
    """Return one strip of ratios for each metric, and the table behind them."""
    strips: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for name in METRICS:
        shift = 1.0 if name == "quality_loss_ratio" else 0.0  # losses near 0: compare perplexities instead
        dots: list[dict[str, Any]] = []
        for row in view.rows if view.answer.measured else ():
            if name not in row.points or name not in row.predicted or not row.points[name].observed:
                continue
            seen, said = row.points[name], row.predicted[name]
            if min(seen.value + shift, said.value + shift) <= 0:
                continue
            slack = 1e-9 * abs(seen.value)
            held = said.low - slack <= seen.value <= said.high + slack
            ratio = (seen.value + shift) / (said.value + shift)
            interval = [(x + shift) / (said.value + shift) for x in (said.low, said.high)]
            dots.append({"row": row, "ratio": ratio, "held": held, "interval": interval})
            table.append(
                {"row": row, "metric": METRICS[name].label, "said": said.text, "seen": seen.text, "held": held}
            )
        if dots:
            strips.append({"name": name, "label": METRICS[name].label, "dots": dots})
    far = max((max(d["ratio"], 1 / d["ratio"]) for s in strips for d in s["dots"]), default=1.0)
    end = next((r for r in REACH if r >= far), REACH[-1])
    for strip in strips:
        dots = strip["dots"]
        low, high = (sorted(d["interval"][i] for d in dots)[len(dots) // 2] for i in (0, 1))
        report = view.answer.prediction_errors.get(strip["name"], {})
        strip |= {
            "low": _at(low, end), "width": round(_at(high, end) - _at(low, end), 2), "n": len(dots),
            "coverage": report.get("coverage", sum(d["held"] for d in dots) / len(dots)),
            "median": report.get("median_abs_ratio"),
        }  # fmt: skip
        for i, dot in enumerate(dots):
            dot |= {"at": _at(dot["ratio"], end), "down": round(14 + 72 * (i + 0.5) / len(dots), 1)}
    inside = sum(r["held"] for r in table)
    return {
        "strips": strips, "table": table, "ticks": _ticks(end), "held": inside, "promised": "80 %",
        "share": f"{inside / len(table):.0%}".replace("%", " %") if table else "",
    }  # fmt: skip


def _at(ratio: float, end: float) -> float:
    share = 0.5 + 0.5 * math.log(max(ratio, 1e-12)) / math.log(end)
    return round(100 * max(0.0, min(1.0, share)), 2)


def _ticks(end: float) -> list[tuple[float, str]]:
    sides = [1 / end, 1 / math.sqrt(end), 1.0, math.sqrt(end), end]
    return [(_at(r, end), f"{r:.2g}×") for r in sides]
