"""Part 6: where the time went: building, loading and measuring each candidate, and the interleaved finals."""

from __future__ import annotations

import calendar
import re
import time
from typing import Any

from knowledge_base import units
from knowledge_base.types import Measurement
from planner.reports.html._view import View

TITLE = "How the time was spent"
LEAD = "One row for each candidate, in the order they were tried."
STAGES = ("build", "load", "measure", "quality and the rest", "interleave")


def facts(view: View) -> dict[str, Any]:
    """Return each candidate's stages, in per cent of the whole run."""
    rows = [(row, row.result.measurement) for row in view.rows if row.result.measurement]
    rows.sort(key=lambda pair: (pair[1].taken_at, pair[1].sequence))
    began = _run_began(view.answer.run_id)
    spans = {row.id: span for row, m in rows if (span := _span(m)) and (began is None or span[0] >= began)}
    known = [row for row, _ in rows if row.id not in spans]
    timed = [(row, m) for row, m in rows if row.id in spans]
    if not timed:
        return {"rows": [], "known": known, "ticks": [], "stages": STAGES, "total": "", "seconds": _seconds(view)}
    start = min(spans[row.id][0] for row, _ in timed)
    end = max(spans[row.id][1] for row, _ in timed)
    finals = float(view.answer.search.get("seconds", {}).get("finals", 0.0))
    whole = max(end + finals - start, 1e-9)

    def at(second: float) -> float:
        return round(100 * max(0.0, min(1.0, (second - start) / whole)), 2)

    lines = []
    for row, measurement in timed:
        first, last = spans[row.id]
        stages = _stages(measurement, first, last)
        if finals and measurement.protocol.get("interleaved_blocks"):
            stages.append(("interleave", end, end + finals))
        failure = measurement.failure
        lines.append(
            {
                "row": row, "took": units.format(last - first, "time"), "at": at(first), "ends": at(last),
                "why": view.answer.search.get("why_tried", {}).get(row.id, ""),
                "stages": [
                    {"name": n, "number": STAGES.index(n), "from": at(a), "width": round(at(b) - at(a), 2), "text": units.format(b - a, "time")}
                    for n, a, b in stages
                    if b > a
                ],
                "failure": f"{failure.kind} in {failure.stage}: {failure.message}" if failure else "",
            }
        )  # fmt: skip
    return {
        "rows": lines, "known": known, "ticks": _ticks(whole), "stages": STAGES, "total": units.format(whole, "time"),
        "seconds": _seconds(view),
    }  # fmt: skip


def _run_began(run_id: str) -> float | None:
    """Return the minute a run folder's name says, in seconds since 1970."""
    found = re.match(r"\d{4}-\d\d-\d\dT\d{4}Z", run_id)
    return float(calendar.timegm(time.strptime(found[0], "%Y-%m-%dT%H%MZ"))) if found else None


def _span(measurement: Measurement) -> tuple[float, float] | None:
    """Return when a candidate began and ended; None for a record without times."""
    wall_s = measurement.protocol.get("wall_s")
    if not wall_s or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", measurement.taken_at):
        return None
    ended = calendar.timegm(time.strptime(measurement.taken_at, "%Y-%m-%dT%H:%M:%SZ"))
    return ended - float(wall_s), float(ended)


def _stages(measurement: Measurement, first: float, last: float) -> list[tuple[str, float, float]]:
    """Return (stage, from, to) in the order they happen; what none of them accounts for is the rest."""
    protocol = measurement.protocol
    built = measurement.figures.get("build_s")
    build_s = built.value if built else sum((protocol.get("step_s") or {}).values())
    lengths = {"build": build_s, "load": protocol.get("load_s", 0.0), "measure": protocol.get("timed_s", 0.0)}
    found, now = [], first
    for name, length_s in lengths.items():
        after = min(last, now + float(length_s or 0.0))
        found.append((name, now, after))
        now = after
    stopped_in = {"build": "build", "open": "load", "measure": "measure"}
    rest = stopped_in.get(measurement.failure.stage) if measurement.failure else None
    return [*found, (rest or STAGES[3], now, last)]


def _ticks(whole: float) -> list[tuple[float, str]]:
    step = next((s for s in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200) if whole / s <= 6), 14400)
    return [(round(100 * s / whole, 2), _clock(s)) for s in range(0, int(whole) + 1, step)]


def _clock(seconds: int) -> str:
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def _seconds(view: View) -> list[tuple[str, str]]:
    """Return the time of each stage of the whole run."""
    found = [(k, float(v)) for k, v in view.answer.search.get("seconds", {}).items()]
    if "wall_s" in view.answer.search:
        found.append(("everything", float(view.answer.search["wall_s"])))
    return [(name, units.format(s, "time")) for name, s in found]
