"""Part 5: from each choice to what it bought and cost, to the evidence, and to what stood in its place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.metrics import LABELS, METRICS
from knowledge_base.registry import techniques
from knowledge_base.types import Evidence, Step, Technique
from planner.reports.html._view import Row, View
from planner.reports.html._words import Change, changes

TITLE = "Why this plan"
LEAD = (
    "Each choice with what it bought and cost, the published evidence for it, and what could have stood in its place."
)
MOST_RIVALS = 6
MOST_EVIDENCE = 5
_EFFECT = re.compile(r"(\w+) ([+-][0-9.]+%(?: points)?)")


def facts(view: View) -> dict[str, Any]:
    """Return the recommended plan's steps as a tree, its budgets, and short trees of the rest of the front."""
    best = view.recommended
    return {
        "best": best,
        "steps": [_step(view, best, step) for step in best.result.plan.steps] if best else [],
        "closing": _closing(best) if best else [],
        "others": [
            {"row": row, "steps": [_effects(row, s) | {"step": str(s)} for s in row.result.plan.steps], "closing": _closing(row)}
            for row in view.front
            if row is not best
        ],
    }  # fmt: skip


def _step(view: View, best: Row, step: Step) -> dict[str, Any]:
    technique = _technique(step.technique)
    module = techniques.get(step.technique) if technique else None
    evidence: Sequence[Evidence] = getattr(module, "EVIDENCE", ())
    return {
        "step": str(step), "technique": technique, **_effects(best, step),
        "evidence": [_evidence(e) for e in evidence[:MOST_EVIDENCE]], "more": max(0, len(evidence) - MOST_EVIDENCE),
        "sources": [{"text": s, "link": _link(s)} for s in technique.sources] if technique else [],
        "rivals": _rivals(view, best, step), "methods": _methods(technique) if technique else [],
    }  # fmt: skip


def _methods(technique: Technique) -> list[dict[str, Any]]:
    """Return the methods a technique executes: their names, and what the field knows around each as a picture."""
    from markupsafe import Markup

    from knowledge_base.field import field
    from knowledge_base.pictures import picture

    known = field()
    return [
        {
            "name": known.method(m).name,
            "place": " / ".join(known.path(known.method(m).topic)),
            "picture": Markup(picture(m)),
        }
        for m in technique.implements
    ]  # its labels are escaped where it is drawn


def _technique(name: str) -> Any:
    try:
        return techniques.get(name).TECHNIQUE
    except BadInput:
        return None  # a run of another version: its plan is told without what is known of the technique


def _effects(row: Row, step: Step) -> dict[str, Any]:
    """Return what a step bought and cost, read from the reason written when the run ended."""
    head = f"{step}: "
    line = next((w.removeprefix(head) for w in row.result.why if w.startswith(head)), "")
    body, _, kind = line.rpartition(" (")
    found = []
    for label, amount in _EFFECT.findall(body):
        metric = METRICS.get(LABELS.get(label, ""))
        lower = amount.startswith("-")
        shown = amount.replace("-", "−").replace("% points", " points").replace("%", " %")
        found.append(Change(label=label, text=shown, good=lower == (metric.better == "lower") if metric else None))
    return {"changes": found, "effect": "" if found else body or "not told apart", "source": kind.rstrip(")")}


def _closing(row: Row) -> list[str]:
    """Return the reasons that are not about a step: what binds, what the plan is."""
    steps = tuple(f"{s}: " for s in row.result.plan.steps)
    return [w for w in row.result.why if not w.startswith(steps)] if steps else list(row.result.why)


def _evidence(row: Evidence) -> dict[str, Any]:
    before = "" if row.baseline is None else f"{row.baseline:g} → "
    return {
        "model": row.model, "setting": row.setting, "quantity": row.quantity, "figure": f"{before}{row.value:g}",
        "source": row.source, "link": _link(row.source),
    }  # fmt: skip


def _link(source: str) -> str | None:
    """Return the web address of a source, or None: only http(s) is linked."""
    if found := re.fullmatch(r"arXiv:([0-9]{4}\.[0-9]{4,5}(?:v[0-9]+)?)", source):
        return f"https://arxiv.org/abs/{found[1]}"
    if found := re.fullmatch(r"doi:(10\.\S+)", source):
        return f"https://doi.org/{found[1]}"
    return source if re.fullmatch(r"https?://[^\s\"'<>]+", source) else None


def _rivals(view: View, best: Row, step: Step) -> list[dict[str, str]]:
    """Return what could stand in a step's place and why it does not: other settings measured, and its family."""
    found = []
    for row in view.rows:
        other = row.result.plan.step(step.technique)
        if other is not None and other != step:
            found.append({"what": f"{other} in {row.id}", "why": _why_not(view, best, row)})
    mine = _technique(step.technique)
    for name in techniques.names() if mine else ():
        if name == step.technique or techniques.get(name).TECHNIQUE.family != mine.family:
            continue
        ruled = [r.why for r in view.answer.rejected if name in r.what and r.kind in ("rule", "engine")]
        tried = [row for row in view.rows if row.result.plan.step(name)]
        if ruled:
            found.append({"what": name, "why": ruled[0]})
        found += [
            {"what": f"{row.result.plan.step(name)} in {row.id}", "why": _why_not(view, best, row)} for row in tried
        ]
        if not ruled and not tried:
            found.append(
                {"what": name, "why": "possible here, but no plan with it was predicted to be worth measuring"}
            )
    rest = len(found) - MOST_RIVALS
    return [*found[:MOST_RIVALS], *([{"what": f"{rest} more", "why": "see all plans"}] if rest > 0 else [])]


def _why_not(view: View, best: Row, row: Row) -> str:
    measurement = row.result.measurement
    if measurement and measurement.failure:
        return f"failed, {measurement.failure.kind}: {measurement.failure.message}"
    beyond = [v.sentence for v in row.result.verdicts if v.outcome == "not met" and v.budget.level == "error"]
    if beyond:
        return "; ".join(beyond)
    told = ", ".join(f"{c.label} {c.text}" for c in changes(best, row, view.objectives))
    return f"meets the budgets; against the recommended plan: {told or 'no difference that can be told'}"
