"""Part 1: the answer, how it stands to each budget, and the commands that make it yours."""

from __future__ import annotations

from typing import Any

from knowledge_base import units
from knowledge_base.metrics import METRICS
from planner.reports import _table
from planner.reports.html._view import Row, View, of_ratio
from planner.reports.html._words import changes
from planner.results import Verdict

TITLE = "The answer"
LEAD = "The plan to take, and how it stands to each of your budgets."
LIMIT_AT = 75.0  # per cent of a strip's length at which the limit stands, where the figure leaves it there
_SERVER_FLAGS = (
    ("thread_count", "count", " -t {}"),
    ("pin_threads", "count", " -t {}"),
    ("batch_size", "count", " -np {}"),
    ("kv_cache_quantised", "bits", " -fa on -ctk q{0}_0 -ctv q{0}_0"),
)


def facts(view: View) -> dict[str, Any]:
    """Return the recommended plan's figures, budgets, commands and alternatives."""
    best = view.recommended
    shown = best or view.baseline
    return {
        "best": best,
        "cards": [_card(view, best, name) for name in view.objectives if name in best.points] if best else [],
        "whose": "the recommended plan" if best else "the model as it came",
        "strips": [_strip(v) for v in shown.result.verdicts] if shown else [],
        "commands": _commands(view, best) if best else [],
        "alternatives": _alternatives(view, best) if best else [],
    }


def _card(view: View, best: Row, name: str) -> dict[str, Any]:
    point, baseline = best.points[name], view.baseline
    against = ""
    if baseline and best is not baseline and name in baseline.points:
        reference = baseline.points[name].value
        if name in best.result.ratios:
            ratio = best.result.ratios[name]
            against = f"{ratio.value:.2g}× the unchanged model’s [{ratio.low:.2g}, {ratio.high:.2g}], interleaved"
        elif reference:
            against = f"{point.value / reference:.2g}× the unchanged model’s"
        elif METRICS[name].dimension == "ratio":
            against = "over the unchanged model"
    dimension = METRICS[name].dimension
    interval = f"{units.format(point.low, dimension)} – {units.format(point.high, dimension)}"
    sure = "80 %" if point.source == "predicted" else "95 %"
    return {
        "label": METRICS[name].label, "summary": METRICS[name].summary, "against": against, "source": point.source,
        "value": units.format(point.value, dimension), "interval": f"{sure} interval {interval}" if point.high > point.low else "does not vary",
    }  # fmt: skip


def _alternatives(view: View, best: Row) -> list[dict[str, Any]]:
    """Return the smallest, the fastest and the closest to the original, and how each differs from the plan to take."""
    rows = {id(row.result): row for row in view.rows}
    found = [(names, rows[id(result)]) for names, result in _table.named(view.answer)]
    shown = [*view.objectives, "peak_memory_bytes"]
    return [
        {"names": names, "row": row, "best": row is best, "changes": changes(best, row, shown)} for names, row in found
    ]


def _strip(verdict: Verdict) -> dict[str, Any]:
    """Return one budget as a bar towards its limit: everything in per cent of the strip's length."""
    budget, seen = verdict.budget, verdict.figure or verdict.value
    value, low, high = 0.0, 0.0, 0.0
    if verdict.figure:
        value, low, high = verdict.figure.value, verdict.figure.low, verdict.figure.high
    elif verdict.value:
        value, low, high = verdict.value.mid, verdict.value.low, verdict.value.high
    longest = max(verdict.limit / LIMIT_AT * 100, high * 1.04, 1e-300)

    def share(x: float) -> float:
        return round(max(0.0, min(100.0, 100 * x / longest)), 2)

    relative = of_ratio(verdict)

    def text(x: float) -> str:
        return f"{x:.3g}×" if relative else units.format(x, METRICS[budget.metric].dimension)

    source = verdict.figure.source if verdict.figure else "predicted"
    return {
        "label": budget.label, "outcome": verdict.outcome, "mark": _table.MARKS[verdict.outcome], "level": budget.level,
        "limit": f"{'at most' if budget.bound == 'max' else 'at least'} {text(verdict.limit) if verdict.limit else budget.text}",
        "written": budget.text, "bound": budget.bound, "known": seen is not None,
        "value": text(value), "interval": f"{text(low)} – {text(high)}" if high > low else "",
        "bar": share(value), "low": share(low), "high": share(high), "limit_at": share(verdict.limit),
        "source": f"{source}, paired" if relative else source, "sentence": verdict.sentence,
    }  # fmt: skip


def _commands(view: View, best: Row) -> list[tuple[str, str]]:
    """Return (what it does, command) to explain, build, verify and serve the plan."""
    explain = [("Why this plan, step by step", f"leanplan explain {best.id}")]
    if not view.answer.measured:
        return [("Measure it here, with its rivals", "leanplan plan SPEC")]
    build = [
        ("Build its artefact", f"leanplan build {best.id} -o artefact"),
        ("Check the artefact’s digests", "leanplan verify artefact"),
    ]
    how = "Serve it" if best.result.plan.engine == "llama_cpp" else "Run it from Python"
    return [*explain, *build, (how, _serve(best))]


def _serve(best: Row) -> str:
    """Return how the artefact is put to work: llama.cpp's own server, or a few lines of Python."""
    knobs = {s.technique: s.knobs for s in best.result.plan.steps}
    if best.result.plan.engine == "llama_cpp":
        command = "llama-server -m artefact/model.gguf"
        for technique, knob, flags in _SERVER_FLAGS:
            value = knobs.get(technique, {}).get(knob)
            if type(value) is int:  # whoever copies a command must not run what a stranger put into a result.json
                command += flags.format(value)
        return command
    return "\n".join(
        [
            "from pathlib import Path",
            "from knowledge_base.registry import engines",
            "from planner.building import read_manifest",
            "",
            'folder = Path("artefact")',
            "manifest = read_manifest(folder)",
            'running = engines.get(manifest["engine"]).open_artefact(folder, manifest["runtime"])',
            "print(running.generate([[1, 2, 3]], new_tokens=16).tokens)",
        ]
    )
