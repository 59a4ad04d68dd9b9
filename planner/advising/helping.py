"""What helps: techniques alone, and short compositions that relieve what binds; effects predicted, with their price."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_base import units
from knowledge_base.field import field
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines, techniques
from knowledge_base.types import Evidence, Model, Plan, Step
from planner.forecast import Outlook

if TYPE_CHECKING:
    import numpy as np

RESOURCES = {  # metric whose change shows what a technique does to a resource -> what a table calls it
    "latency_s": "time", "peak_memory_bytes": "memory", "artefact_bytes": "size and network",
    "energy_j_per_token": "energy", "cost_usd_per_token": "money",
}  # fmt: skip
LOSS = "quality_loss_ratio"
HELPERS = 4  # techniques told for each resource
REMEDIES = 6  # compositions told
LONGEST = 3  # steps of a composition worth telling in advice
WORTH = 0.03  # a saving below this share is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Citation:
    """What speaks for a step: how many published figures there are, and the one nearest to it in setting and size."""

    technique: str
    figures: int  # published figures on its method
    example: str  # "4 bits, whole rows, OPT-2.7B: WikiText-2 perplexity 12.47 -> 12.87", empty where it brings none
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Helper:
    """One technique at its best setting here. `effects`: metric -> change against the unchanged model, -0.5 is half."""

    what: str  # "weight_gguf(type=q4_k) on llama_cpp", "llama_cpp instead of transformers"
    effects: Mapping[str, float]
    because: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """A short plan that relieves what binds. `effects` as in Helper; `unmet`: sentences on the limits still broken."""

    plan: Plan
    effects: Mapping[str, float]
    value: float  # of the metric that binds, in its unit
    unmet: tuple[str, ...]
    requires: tuple[str, ...]
    evidence: tuple[Citation, ...]


# ---------------------------------------------------------------- techniques alone


def helpers(outlook: Outlook) -> tuple[tuple[Helper, ...], list[Step]]:
    """Return the techniques that save most of each resource within the quality budget, and their steps.

    An effect is against the unchanged model on the same engine; what another engine changes is told by itself.
    """
    space = outlook.space
    alone = [space.unchanged(engine) for engine in space.options]
    single = [
        plan
        for engine, families in space.options.items()
        for steps in families.values()
        for step in steps
        if (plan := space.plan(engine, (step,))) is not None
    ]
    plans = [*alone, *single]
    priced = outlook.priced.problem.price(plans)
    figures = {name: priced.figures[name].mid for name in (*RESOURCES, LOSS) if name in priced.figures}
    start = {plan.engine: i for i, plan in enumerate(alone)}
    limits = [limit for b in outlook.binding if b.metric == LOSS and (limit := outlook.limit(b)) is not None]
    most = min(limits, default=float("inf"))
    best: dict[str, dict[str, int]] = {}  # metric -> technique -> its best plan
    for metric in [name for name in RESOURCES if name in figures]:
        best[metric] = {}
        for i in sorted(range(len(alone), len(plans)), key=lambda i: figures[metric][i]):
            if _change(figures, metric, i, start[plans[i].engine]) <= -WORTH and figures[LOSS][i] <= most:
                best[metric].setdefault(plans[i].steps[0].technique, i)
    chosen: dict[str, int] = {}  # technique -> the setting that is told: the one best for the first resource it helps
    for found in best.values():
        for technique in list(found)[:HELPERS]:
            chosen.setdefault(technique, found[technique])
    told = []
    for i in [*range(1, len(alone)), *chosen.values()]:
        reference = 0 if i < len(alone) else start[plans[i].engine]
        step = plans[i].steps[0] if plans[i].steps else None
        told.append(
            Helper(
                what=f"{step} on {plans[i].engine}" if step else f"{plans[i].engine} instead of {alone[0].engine}",
                effects={metric: _change(figures, metric, i, reference) for metric in figures},
                because=_because(plans[i], outlook) if step else engines.get(plans[i].engine).ENGINE.summary,
                source=citation(step, outlook.model).source
                if step
                else next(iter(engines.get(plans[i].engine).ENGINE.sources), ""),
            )
        )
    return tuple(told), [plans[i].steps[0] for i in chosen.values()]


def _change(figures: Mapping[str, np.ndarray], metric: str, after: int, before: int) -> float:
    start, end = float(figures[metric][before]), float(figures[metric][after])
    return end - start if METRICS[metric].dimension == "ratio" else end / start - 1


def _because(plan: Plan, outlook: Outlook) -> str:
    from cost_models.demand import demand_chain

    return "; ".join(demand_chain(plan, outlook.model, outlook.spec.workload)[-1][1].because)


# ---------------------------------------------------------------- compositions


def remedies(outlook: Outlook, target: str, *, pressed: bool) -> tuple[Remedy, ...]:
    """Return short plans that better `target`, those within every limit first.

    Among these the least loss of quality and the fewest steps come first where a limit presses, else what saves most of
    `target`, less a share for the same share of quality. Of plans with the same techniques only the best setting is told, and no plan that contains one told.
    """
    priced = outlook.priced
    values, losses = priced.figures[target].mid, priced.figures[LOSS].mid
    sign = 1 if METRICS[target].better == "lower" else -1
    start = outlook.unchanged.values[target].mid
    within, beyond = outlook.within(), _beyond(outlook)

    def rank(i: int) -> tuple[float, ...]:
        gain = sign * (float(values[i]) - start) / abs(start)
        need = (round(float(losses[i]), 3), len(priced.plans[i].steps), gain) if pressed else (gain + float(losses[i]),)
        return (not within[i], 0.0 if within[i] else float(beyond[i]), *need)

    relieving = [
        i
        for i, plan in enumerate(priced.plans)
        if 0 < len(plan.steps) <= LONGEST and sign * (values[i] - start) <= -WORTH * abs(start)
    ]
    told: dict[tuple[str, frozenset[str]], int] = {}
    for i in sorted(relieving, key=rank):
        plan = priced.plans[i]
        names = frozenset(step.technique for step in plan.steps)
        if not any(engine == plan.engine and known <= names for engine, known in told):
            told[plan.engine, names] = i
        if len(told) == REMEDIES:
            break
    return tuple(_remedy(outlook, i, target) for i in told.values())


def _beyond(outlook: Outlook) -> np.ndarray:
    """Return (plans,): how far a plan is beyond its limits, as shares of them, summed."""
    import numpy as np

    memory = outlook.priced.figures["peak_memory_bytes"].mid / outlook.memory_bytes - 1
    columns = [outlook.priced.violation(budget) for budget in outlook.binding]
    return sum(np.maximum(column, 0.0) for column in (memory, *columns) if column is not None)


def _remedy(outlook: Outlook, index: int, target: str) -> Remedy:
    plan, figures = outlook.priced.plans[index], outlook.priced.figures
    effects = {}
    for metric in (*RESOURCES, LOSS):
        if metric in figures and metric in outlook.unchanged.values:
            before, after = outlook.unchanged.values[metric].mid, float(figures[metric].mid[index])
            effects[metric] = after - before if METRICS[metric].dimension == "ratio" else after / before - 1
    unmet = [
        f"{budget.label} {units.format(float(figures[budget.metric].mid[index]), METRICS[budget.metric].dimension)}, "
        f"the budget is {units.format(limit, METRICS[budget.metric].dimension)}"
        for budget in outlook.binding
        if (limit := outlook.limit(budget)) is not None and float(outlook.priced.violation(budget)[index]) > 0  # type: ignore[index]
    ]
    if (peak := float(figures["peak_memory_bytes"].mid[index])) > outlook.memory_bytes:
        unmet.append(
            f"peak_memory {units.format(peak, 'bytes')}, there are {units.format(outlook.memory_bytes, 'bytes')}"
        )
    return Remedy(
        plan=plan, effects=effects, value=float(figures[target].mid[index]), unmet=tuple(unmet),
        requires=tuple(dict.fromkeys(need for step in plan.steps for need in requirements(step.technique))),
        evidence=tuple(citation(step, outlook.model) for step in plan.steps),
    )  # fmt: skip


# ---------------------------------------------------------------- what speaks for a technique, what it asks for


def requirements(technique: str) -> tuple[str, ...]:
    """Return what a technique asks for beyond the model and the plan's engine, in words."""
    declared = techniques.get(technique).TECHNIQUE
    needs = ["calibration text"] if declared.needs_calibration else []
    return (*needs, *([f"pip install 'leanplan[{declared.extra}]'"] if declared.extra else []))


def citation(step: Step, model: Model) -> Citation:
    """Return what was published on a technique: its own figure nearest in setting, then in size, and how many there are."""
    module = techniques.get(step.technique)
    declared, own = module.TECHNIQUE, module.EVIDENCE
    figures = sum(len(field().evidence_of(method)) for method in declared.implements) or len(own)
    if not own:
        source = next(iter(declared.sources), "")
        return Citation(technique=step.technique, figures=figures, example="", source=source)
    near = min(own, key=lambda figure: (not _speaks_of(figure, step), _apart(figure, model)))
    before = "" if near.baseline is None else f"{near.baseline:g} -> "
    example = f"{near.setting}, {near.model}: {near.quantity} {before}{near.value:g}"
    return Citation(technique=step.technique, figures=figures, example=example, source=near.source)


def _speaks_of(figure: Evidence, step: Step) -> bool:
    """Whether a figure's setting names a value of the step: `KV int4` does for bits=4."""
    return any(
        re.search(rf"(?<![\d.]){re.escape(str(value))}(?![\d.])", figure.setting, re.IGNORECASE)
        for value in step.knobs.values()
    )


def _apart(figure: Evidence, model: Model) -> float:
    """Return the ratio of sizes in log space, by what the name of the figure's model says; infinite where it says nothing."""
    said = re.search(r"(\d+(?:\.\d+)?)([BM])\b", figure.model)
    if said is None:
        return math.inf
    return abs(math.log(float(said[1]) * {"B": 1e9, "M": 1e6}[said[2]] / model.params_total))
