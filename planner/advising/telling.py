"""Advice as lines for people."""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base import units
from knowledge_base.metrics import METRICS
from planner.advising import Advice
from planner.advising.helping import LOSS, RESOURCES, Citation, Remedy
from planner.advising.known import KnownMethod
from planner.reports._table import value_text
from planner.reports.knowledge.card import many

SHOWN = ("tpot_s", "peak_memory_bytes", "artefact_bytes", LOSS)  # of the best plans


def as_text(found: Advice) -> str:
    """Return the advice as lines for people."""
    parts = (_head, _binds, _relieves, _alone, _known, _attention, _conflicts, _left_out, _best)
    return "\n\n".join("\n".join(lines) for part in parts if (lines := part(found)))


def _head(found: Advice) -> list[str]:
    model, workload = found.model, found.workload
    requests = f"{workload.concurrency} request{'s' if workload.concurrency > 1 else ''} at a time"
    return [
        f"{model.name} on {found.hardware.device.name} ({found.hardware.name}): {model.params_total / 1e6:,.1f} M parameters, "
        f"{units.format(model.weight_bytes, 'bytes')} in {model.weight_dtype}",
        f"{workload.prompt_tokens} prompt + {workload.output_tokens} output tokens, {requests}; predicted, nothing was run",
        *([f"limits: {', '.join(found.limits)}"] if found.limits else []),
        *found.notes,
    ]


def _binds(found: Advice) -> list[str]:
    needed, there = (units.format(size, "bytes") for size in (found.needed_bytes, found.memory_bytes))
    return [
        f"What binds: {found.binding}",
        *(f"  {excess.sentence}" for excess in found.excesses),
        f"  memory: the unchanged model needs {needed} of {there}",
        *(f"  {bound.resource}: {bound.sentence}" for bound in found.bounds),
        *(f"  {METRICS[name].label}: {made_of}" for name, made_of in found.parts.items()),
    ]


def _relieves(found: Advice) -> list[str]:
    metric = METRICS[found.target]
    if not found.remedies:
        return [f"What relieves it: nothing here saves 3 % or more of {metric.label}"]
    lines = [f"What relieves it, by {metric.label}; changes are against the unchanged model:"]
    for place, remedy in enumerate(found.remedies, 1):
        lines += [f"  {place}. {remedy.plan.words}", *(f"      {line}" for line in _remedy(remedy, found.target))]
    return lines


def _remedy(remedy: Remedy, target: str) -> list[str]:
    metric = METRICS[target]
    fits = "still beyond: " + "; ".join(remedy.unmet) if remedy.unmet else "within every limit"
    lines = [f"{metric.label} {units.format(remedy.value, metric.dimension)}, {fits}", _effects(remedy.effects)]
    lines += [f"needs {', '.join(remedy.requires)}"] if remedy.requires else []
    return lines + [_citation(citation) for citation in remedy.evidence]


def _effects(effects: Mapping[str, float]) -> str:
    said = [
        f"{RESOURCES.get(metric, 'quality loss')} {change:+.0%}{' points' if metric == LOSS else ''}"
        for metric, change in effects.items()
        if abs(change) >= 0.005
    ]
    return ", ".join(said) or "no change of half a percent"


def _citation(said: Citation) -> str:
    if not said.figures:
        return f"{said.technique}: {said.source}"
    example = f", e.g. {said.example}" if said.example else ""
    return f"{said.technique}: {many(said.figures, 'published figure')}{example} [{said.source}]"


def _alone(found: Advice) -> list[str]:
    lines = ["What helps, each alone against the unchanged model on the same engine:"]
    for helper in found.helpers:
        lines += [f"  {helper.what}: {_effects(helper.effects)}", f"      {helper.because} [{helper.source}]"]
    return lines if found.helpers else [*lines, "  nothing here saves 3 % or more of any resource"]


def _known(found: Advice) -> list[str]:
    if not found.known:
        return []
    lines = ["What the field knows for it and Leanplan cannot execute yet (published figures, not predictions):"]
    for method in found.known:
        lines += [f"  {method.name} ({method.id}): {_published(method)}", f"      {method.summary}"]
        lines += [f"      needs {'; '.join(method.requires)}"] if method.requires else []
        lines += [f"      not here: needs {'; '.join(method.unmet)}"] if method.unmet else []
        lines += [f"      [{method.source}]"] if method.source else []
    return lines


def _published(method: KnownMethod) -> str:
    price = f"; costs {', '.join(method.spends)}" if method.spends else ""
    if method.published is None:
        return f"{method.strength or 'an'} effect, no figures with a baseline{price}"
    said = method.published
    return (
        f"{said.factor:.2g} of what was needed at the median [{said.low:.2g} – {said.high:.2g}, "
        f"{many(said.rows, 'figure')} of {many(said.models, 'model')}]{price}"
    )


def _attention(found: Advice) -> list[str]:
    if not found.attention:
        return []
    said = [f"{other.name} ×{other.prefill_flop_ratio:.2g}" for other in found.attention]
    return [
        f"Another attention would leave of the arithmetic of {found.workload.prompt_tokens:,} prompt tokens: {', '.join(said)}",
        "  (growth as in the survey's Table 1; a model must be trained with it)",
    ]


def _conflicts(found: Advice) -> list[str]:
    return ["What conflicts:", *(f"  {why}" for why in found.conflicts)] if found.conflicts else []


def _left_out(found: Advice) -> list[str]:
    ruled = [r for r in found.left_out if r.kind in ("rule", "engine")]
    return ["What was left out:", *(f"  {r.what}: {r.why}" for r in ruled)] if ruled else []


def _best(found: Advice) -> list[str]:
    if not found.best:
        could = [
            f"  {label} could be {limit} at best, beside the other budgets" for label, limit in found.tightest.items()
        ]
        return ["No plan is predicted to fit.", *could]
    names: dict[str, list[str]] = {}
    for name, result in found.best.items():
        names.setdefault(result.plan.id, []).append(name)
    lines = ["Best predicted plans:"]
    for result in {result.plan.id: result for result in found.best.values()}.values():
        values = result.estimate.values if result.estimate else {}
        told = [f"{METRICS[m].label} {value_text(values[m], m)}" for m in SHOWN if m in values]
        lines += [f"  {', '.join(names[result.plan.id])}: {result.plan.words}", f"      {', '.join(told)}"]
    return lines
