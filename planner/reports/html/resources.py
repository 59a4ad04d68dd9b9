"""Part 4: what a plan takes of each resource, with the unchanged model as 100 %, and what its memory is made of."""

from __future__ import annotations

import math
from typing import Any

from knowledge_base import units
from knowledge_base.metrics import METRICS
from planner.reports.html._view import Row, View

TITLE = "What it takes of each resource"
LEAD = "Every bar starts at the unchanged model’s figure, 100 %: left is less, right is more, on a logarithmic scale."
MOST_PLANS = 6
RESOURCES = ("computation", "memory", "energy", "money", "network", "quality")
STEPS = (2, 4, 8, 16, 32, 64, 128)
PARTS = ("weights", "KV cache", "engine", "activations and the rest")


def facts(view: View) -> dict[str, Any]:
    """Return the bars of the recommended plan and the others of the front, and the memory of each."""
    baseline = view.baseline
    if baseline is None or not baseline.points:
        return {"plans": [], "memory": [], "parts": PARTS, "ticks": [], "limit": None, "source": ""}
    chosen = [row for row in view.front if row is not baseline][:MOST_PLANS]
    names = sorted(view.metrics, key=lambda name: RESOURCES.index(METRICS[name].resource))
    bars = {row.id: [bar for name in names if (bar := _ratio(row, baseline, name))] for row in chosen}
    widest = max((max(b["high"], 1 / b["low"]) for found in bars.values() for b in found if b["low"] > 0), default=2.0)
    end = next((s for s in STEPS if s >= widest), STEPS[-1])
    stacks = [stack for row in [baseline, *chosen] if (stack := _memory(row))]
    longest = max((s["peak"] for s in stacks), default=1.0)
    limit = view.limits.get("peak_memory_bytes")
    return {
        "plans": [{"row": row, "bars": [_placed(b, end) for b in bars[row.id]]} for row in chosen],
        "ticks": _ticks(end),
        "memory": [_stacked(s, longest) for s in stacks], "parts": PARTS,
        "limit": {"text": limit[2], "at": _per_cent(limit[0] / longest)} if limit else None,
        "source": view.kind_of_figures,
    }  # fmt: skip


def _ratio(row: Row, baseline: Row, name: str) -> dict[str, Any] | None:
    """Return one metric against the unchanged model: paired where blocks were interleaved, else of the two figures."""
    if name not in row.points or name not in baseline.points or METRICS[name].dimension == "ratio":
        return None  # a share of 0 has no ratio; quality shows as perplexity
    ours, theirs = row.points[name], baseline.points[name]
    if name in row.result.ratios:
        ratio = row.result.ratios[name]
        value, low, high, how = ratio.value, ratio.low, ratio.high, f"paired, {ratio.n} interleaved blocks"
    elif min(ours.low, theirs.low) > 0:
        value, how = ours.value / theirs.value, "not paired"
        same_doubt = not ours.observed and ours.source == theirs.source  # what was assumed for both cancels in a ratio
        low, high = (value, value) if same_doubt else (ours.low / theirs.high, ours.high / theirs.low)
    else:
        return None
    if name == "perplexity" and "quality_loss_ratio" in row.points:  # paired over the same windows
        loss = row.points["quality_loss_ratio"]
        value, low, high, how = 1 + loss.value, 1 + loss.low, 1 + loss.high, "paired over held-out windows"
    if value <= 0:
        return None
    metric = METRICS[name]
    good = None if low <= 1 <= high else (value < 1) == (metric.better == "lower")
    source = ours.source if ours.source != "measured" else theirs.source
    text = f"{value:.1%}" if value < 1.1 else f"{value:.0%}" if value < 2 else f"{value:.3g}×"
    return {
        "label": metric.label, "summary": metric.summary, "resource": metric.resource, "value": value, "good": good,
        "low": max(low, 1e-12), "high": high, "text": text.replace("%", " %"), "how": how, "source": source,
        "ours": ours.text, "theirs": theirs.text, "better": metric.better,
    }  # fmt: skip


def _placed(bar: dict[str, Any], end: int) -> dict[str, Any]:
    def at(ratio: float) -> float:
        share = 0.5 + 0.5 * math.log(ratio) / math.log(end)
        return _per_cent(max(0.0, min(1.0, share)))

    here, low, high = at(bar["value"]), at(bar["low"]), at(bar["high"])
    return {**bar, "from": min(50.0, here), "width": round(abs(here - 50), 2), "low_at": low, "high_at": high}


def _ticks(end: int) -> list[tuple[float, str]]:
    """Return 100 % and each doubling to both sides, or each second one where they are many."""
    doublings = int(math.log2(end))
    stride = 1 if doublings <= 3 else 2
    powers = [p for p in range(-doublings, doublings + 1) if p % stride == 0]
    return [(_per_cent(0.5 + 0.5 * p / doublings), f"{100 * 2.0**p:.3g} %" if p < 1 else f"{2**p}×") for p in powers]


def _memory(row: Row) -> dict[str, Any] | None:
    """Return the parts of a plan's peak memory in bytes. What is left after the known parts is the rest."""
    points = row.points
    if not {"peak_memory_bytes", "weights_bytes", "kv_cache_bytes"} <= points.keys():
        return None
    peak = points["peak_memory_bytes"].value
    weights, cache = points["weights_bytes"].value, points["kv_cache_bytes"].value
    measurement = row.result.measurement
    engine = float(measurement.protocol.get("framework_bytes") or 0.0) if measurement else 0.0
    rest = max(0.0, peak - weights - cache - engine)
    return {"row": row, "peak": peak, "parts": (weights, cache, engine, rest), "split": engine > 0}


def _stacked(stack: dict[str, Any], longest: float) -> dict[str, Any]:
    names = PARTS if stack["split"] else (*PARTS[:2], "", "engine, activations and the rest")
    return {
        **stack,
        "text": units.format(stack["peak"], "bytes"),
        "pieces": [
            {"name": name, "number": i, "width": _per_cent(size / longest), "text": units.format(size, "bytes")}
            for i, (name, size) in enumerate(zip(names, stack["parts"], strict=True))
            if name
        ],
    }


def _per_cent(share: float) -> float:
    return round(100 * share, 2)
