"""The pages made from the files of the techniques: one of them all, and one of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tools.reference.demands import demands, legal_plans
from tools.reference.markdown import code, codes, docstring, facts, inline, page, table
from tools.reference.refusals import refusals

if TYPE_CHECKING:
    from knowledge_base.types import Model, Plan, Workload


def techniques() -> str:
    from knowledge_base.registry import techniques as registry

    entries = {name: module.TECHNIQUE for name, module in registry.all().items()}
    overview = [
        (f'<a id="{name}"></a>[`{name}`](techniques/{name}.md)', t.stage, t.family, inline(t.summary))
        for name, t in entries.items()
    ]
    return page(
        "Techniques", "`knowledge_base/techniques/`",
        "A plan holds at most one technique of a family and executes its steps in the order of the stages. Each has a page: "
        "what it does, its settings, what it needs and refuses, what it changes, what was published and what was measured.\n",
        table(("technique", "stage", "family", "what it does"), overview),
    )  # fmt: skip


def each() -> dict[str, str]:
    """Return a page for each technique there is, by name."""
    from benchmarks import techniques as measured
    from benchmarks.readme_tables import figures
    from knowledge_base.registry import techniques as registry

    kept = figures(measured.RESULTS)
    plans = legal_plans()
    return {name: _technique(name, module, plans.get(name, []), kept) for name, module in registry.all().items()}


def _technique(
    name: str, module: ModuleType, plans: Sequence[tuple[Model, Workload, Sequence[Plan]]], kept: Mapping[str, Any]
) -> str:
    from knowledge_base import rules
    from knowledge_base.metrics import METRICS
    from knowledge_base.registry import engines as engine_registry

    t = module.TECHNIQUE
    offering = [e for e, engine in engine_registry.all().items() if t.needs <= engine.ENGINE.offers]
    about = rules.composition().about(name)
    does = {
        "in short": inline(t.summary), "stage, family": f"{t.stage}, {t.family}", "executes": codes(t.implements),
        "place in the survey": inline("; ".join(_place(m) for m in t.implements)),
        "saves": codes(METRICS[m].label for m in t.saves), "spends": codes(METRICS[m].label for m in t.spends),
        "output": "the unchanged model's, token for token" if t.lossless else "may differ from the unchanged model's",
        "sources": ", ".join(inline(s) for s in t.sources),
    }  # fmt: skip
    needs = {
        "engines": codes(offering) or "none here offers what it needs", "needs of an engine": codes(sorted(t.needs)),
        "provides for other steps": codes(sorted(t.provides)),
        "calibration text": "needed" if t.needs_calibration else "not needed", "Python modules": codes(t.modules),
        "composition rules": ", ".join(f"[{r.id}](../composition.md#{r.id})" for r in about),
    }  # fmt: skip
    knobs = [(code(knob), codes(choice.options), code(choice.default)) for knob, choice in t.knobs.items()]
    sentences = [f"- {inline(sentence)}" for sentence in refusals(module)]
    return page(
        name, f"`knowledge_base/techniques/{name}.py`", docstring(module), facts(does),
        "## Settings\n", table(("knob", "may be", "when left out"), knobs) if knobs else "It has none.\n",
        "## What it needs\n", facts(needs),
        "## When it is refused\n", "\n".join(["In the words of its file, … for what depends on model and setting:\n", *sentences, ""]) if sentences else "No model and no setting is refused.\n",
        "## What it changes\n", demands(name, plans),
        "## What was published\n", _published(module),
        "## What was measured\n", _measured(name, kept),
    )  # fmt: skip


def _published(module: ModuleType) -> str:
    from knowledge_base.field import field

    known = field()
    rows = [
        (
            inline(e.model),
            inline(e.setting),
            inline(e.quantity),
            _number(e.baseline),
            _number(e.value),
            inline(e.source),
        )
        for e in getattr(module, "EVIDENCE", ())
    ]
    more = []
    for method in module.TECHNIQUE.implements:
        link = f"[{inline(known.method(method).name)}](../knowledge.md#{method})"
        if count := len(known.evidence_of(method)):
            more.append(f"Figures of {link} in the knowledge base: {count}, told by `leanplan explain {method}`.\n")
        else:
            more.append(f"No figure of {link} in the knowledge base.\n")
    heads = ("model", "setting", "quantity", "before", "after", "source")
    stand = "As their source gives them, for the source's model and setting:\n"
    return "\n".join([*([stand, table(heads, rows)] if rows else []), *more])


def _measured(name: str, kept: Mapping[str, Any]) -> str:
    """Return the rows of benchmarks/techniques.json that are of one technique."""
    from benchmarks import techniques as measured

    parts = []
    for model, found in kept.items():
        if name in found["rows"]:
            shown = measured.as_markdown(found, quality=measured.SUBJECTS[model].quality, only=name)
            note = f" ({inline(found['note'])})" if found["note"] else ""
            parts.append(f"On {inline(found['model'])}{note}, {inline(found['machine'])}, {found['date']}:\n\n{shown}")
        elif why := found["left_out"].get(name):
            parts.append(f"Not on {inline(found['model'])}: {inline(why)}.\n")
    here = f"On a machine of one's own: `leanplan explain {name}`, once a run has measured it.\n"
    return "\n".join([*(parts or ["Not by `benchmarks/techniques.py` yet.\n"]), here])


def _place(method: str) -> str:
    from knowledge_base.field import field

    return " / ".join(field().path(field().method(method).topic))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
