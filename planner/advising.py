"""What `leanplan advise` says of a model on a machine: what binds, what helps, what conflicts. Predicted; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from knowledge_base import rules, units
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines, techniques
from knowledge_base.types import Hardware, Model, Plan, Step, Workload
from planner.forecast import Outlook
from planner.reports._table import value_text
from planner.results import PlanResult, Rejection

RESOURCES = {  # metric whose saving shows that a technique helps -> what a table calls it
    "latency_s": "time", "peak_memory_bytes": "memory", "artefact_bytes": "size", "energy_j_per_token": "energy",
}  # fmt: skip
HELPERS = 4  # techniques told for each resource
WORTH = 0.03  # a saving below this share is none
LOSS = "quality_loss_ratio"
SHOWN = ("tpot_s", "peak_memory_bytes", "artefact_bytes", LOSS)  # of the best plans


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One thing a request waits for. `saved`: the share of its time that twice as much of it would save."""

    resource: str
    saved: float
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Helper:
    """One technique at its best setting here. `effects`: metric -> change against the unchanged model, -0.5 is half."""

    what: str  # "weight_gguf(type=q4_k) on llama_cpp", "llama_cpp instead of transformers"
    effects: Mapping[str, float]
    because: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What is known of a model on a machine without running anything."""

    model: Model
    hardware: Hardware
    workload: Workload
    notes: tuple[str, ...]
    binding: str  # the resource to save first
    needed_bytes: float  # highest memory of the unchanged model
    memory_bytes: float  # what there is
    bounds: tuple[Bound, ...]  # the most binding first
    parts: Mapping[str, str]  # metric -> what it is made of
    helpers: tuple[Helper, ...]
    conflicts: tuple[str, ...]
    left_out: tuple[Rejection, ...]
    best: Mapping[str, PlanResult]  # by what they are best at


def advice(outlook: Outlook) -> Advice:
    """Return the advice for an outlook."""
    bounds = _bounds(outlook)
    helpers, steps = _helpers(outlook)
    peak = outlook.unchanged.values["peak_memory_bytes"].mid
    return Advice(
        model=outlook.model, hardware=outlook.hardware, workload=outlook.spec.workload, notes=outlook.notes,
        binding="memory" if peak > outlook.memory_bytes else bounds[0].resource, bounds=bounds, needed_bytes=peak, memory_bytes=outlook.memory_bytes,
        parts={name: outlook.unchanged.values[name].because for name in ("ttft_s", "tpot_s", "peak_memory_bytes")},
        helpers=helpers, conflicts=_conflicts(steps), left_out=outlook.refused, best=_best(outlook),
    )  # fmt: skip


# ---------------------------------------------------------------- what binds


def _bounds(outlook: Outlook) -> tuple[Bound, ...]:
    """Return what a request of the unchanged model waits for, told by what twice as much of it would save."""
    from cost_models.calibration import Features
    from cost_models.case import case_of
    from cost_models.demand import chains
    from cost_models.predict import evaluate

    workload, plan = outlook.spec.workload, outlook.space.unchanged()
    nodes = [chains(outlook.model, workload).node(plan)]
    case = case_of(nodes, workload, outlook.hardware)

    def latency_s(**factors: float) -> float:
        rates = {name: factor * getattr(case.rates, name) for name, factor in factors.items()}
        changed = replace(case, rates=replace(case.rates, **rates))
        return float(evaluate(changed, None, Features(nodes))["latency_s"].mid.sum())

    device = outlook.hardware.device
    relieved = {
        "memory bandwidth": (
            latency_s(bytes_per_s=2, weights_bytes_per_s=2, kv_bytes_per_s=2),
            f"it reads at most {device.memory_bytes_per_s / 1e9:,.0f} GB/s; twice that",
        ),
        "arithmetic": (
            latency_s(flop_per_s=2, peak_flop_per_s=2),
            f"it multiplies at most {case.rates.peak_flop_per_s[0] / 1e9:,.0f} Gflop/s; twice that",
        ),
        "engine overhead": (
            latency_s(kernel_s=0.5, step_s=0.5),
            f"{plan.engine} spends time starting operators; half of that time",
        ),
    }
    whole = latency_s()
    bounds = [
        Bound(resource=name, saved=1 - left / whole, sentence=f"{what} would save {1 - left / whole:.0%} of a request")
        for name, (left, what) in relieved.items()
    ]
    return tuple(sorted(bounds, key=lambda bound: -bound.saved))


# ---------------------------------------------------------------- what helps


def _helpers(outlook: Outlook) -> tuple[tuple[Helper, ...], list[Step]]:
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

    def change(i: int, metric: str, reference: int) -> float:
        before, after = float(figures[metric][reference]), float(figures[metric][i])
        return after - before if METRICS[metric].dimension == "ratio" else after / before - 1

    best: dict[str, dict[str, int]] = {}  # metric -> technique -> its best plan
    for metric in [name for name in RESOURCES if name in figures]:
        best[metric] = {}
        for i in sorted(range(len(alone), len(plans)), key=lambda i: figures[metric][i]):
            if change(i, metric, start[plans[i].engine]) <= -WORTH and figures[LOSS][i] <= most:
                best[metric].setdefault(plans[i].steps[0].technique, i)
    chosen: dict[str, int] = {}  # technique -> the setting that is told: the one best for the first resource it helps
    for found in best.values():
        for technique in list(found)[:HELPERS]:
            chosen.setdefault(technique, found[technique])
    helpers = []
    for i in [*range(1, len(alone)), *chosen.values()]:
        reference = 0 if i < len(alone) else start[plans[i].engine]
        effects = {metric: change(i, metric, reference) for metric in figures}
        step = plans[i].steps[0] if plans[i].steps else None
        helpers.append(
            Helper(
                what=f"{step} on {plans[i].engine}" if step else f"{plans[i].engine} instead of {alone[0].engine}",
                effects=effects,
                because=_because(plans[i], outlook) if step else engines.get(plans[i].engine).ENGINE.summary,
                source=_source(step.technique if step else plans[i].engine),
            )
        )
    return tuple(helpers), [plans[i].steps[0] for i in chosen.values()]


def _because(plan: Plan, outlook: Outlook) -> str:
    from cost_models.demand import demand_chain

    return "; ".join(demand_chain(plan, outlook.model, outlook.spec.workload)[-1][1].because)


def _source(name: str) -> str:
    """Return a source for what is said of a technique or engine."""
    if name in engines.names():
        return next(iter(engines.get(name).ENGINE.sources), "leanplan show " + name)
    module = techniques.get(name)
    evidence = getattr(module, "EVIDENCE", ())
    return evidence[0].source if evidence else next(iter(module.TECHNIQUE.sources), "leanplan show " + name)


def _conflicts(steps: list[Step]) -> tuple[str, ...]:
    """Return what the composition rules say against these steps together, once each; alternatives of one family left out."""
    families = [techniques.get(step.technique).TECHNIQUE.family for step in steps]
    found: dict[str, None] = {}
    for i, first in enumerate(steps):
        for j, second in enumerate(steps[:i]):
            if families[i] != families[j] and (why := rules.conflict([second, first])):
                found[why] = None
    return tuple(found)


def _best(outlook: Outlook) -> dict[str, PlanResult]:
    """Return the plans predicted best within the budgets, by name."""
    from planner.forecast import as_result

    if outlook.best is None:
        return {}
    plans = {"recommended": outlook.best}
    for name, metric in (
        ("fastest", "latency_s"),
        ("smallest", "artefact_bytes"),
        ("least energy", "energy_j_per_token"),
    ):
        if (reach := outlook.reach(metric)) is not None:
            plans[name] = reach.plan
    return {name: as_result(outlook, plan) for name, plan in plans.items()}


# ---------------------------------------------------------------- for people


def as_text(found: Advice) -> str:
    """Return the advice as lines for people."""
    model, workload = found.model, found.workload
    requests = f"{workload.concurrency} request{'s' if workload.concurrency > 1 else ''} at a time"
    lines = [
        f"{model.name} on {found.hardware.device.name} ({found.hardware.name}): {model.params_total / 1e6:,.1f} M parameters, "
        f"{units.format(model.weight_bytes, 'bytes')} in {model.weight_dtype}",
        f"{workload.prompt_tokens} prompt + {workload.output_tokens} output tokens, {requests}; predicted, nothing was run",
        *found.notes,
        "",
        f"What binds: {found.binding}",
        f"  memory: the unchanged model needs {_bytes(found.needed_bytes)} of {_bytes(found.memory_bytes)}",
        *(f"  {bound.resource}: {bound.sentence}" for bound in found.bounds),
        *(f"  {METRICS[name].label}: {made_of}" for name, made_of in found.parts.items()),
        "",
        "What helps, each alone against the unchanged model on the same engine:",
    ]
    for helper in found.helpers:
        effects = [
            f"{RESOURCES.get(metric, 'quality loss')} {change:+.0%}{' points' if metric == LOSS else ''}"
            for metric, change in helper.effects.items()
            if abs(change) >= 0.005
        ]
        lines += [
            f"  {helper.what}: {', '.join(effects)}",
            f"      {helper.because} [{helper.source}]",
        ]
    lines += [] if found.helpers else ["  nothing here saves 3 % or more of any resource"]
    if found.conflicts:
        lines += ["", "What conflicts:", *(f"  {why}" for why in found.conflicts)]
    if ruled := [r for r in found.left_out if r.kind in ("rule", "engine")]:
        lines += ["", "What was left out:", *(f"  {r.what}: {r.why}" for r in ruled)]
    lines += ["", "Best predicted plans:" if found.best else "No plan is predicted to fit."]
    names: dict[str, list[str]] = {}
    for name, result in found.best.items():
        names.setdefault(result.plan.id, []).append(name)
    for result in {result.plan.id: result for result in found.best.values()}.values():
        values = result.estimate.values if result.estimate else {}
        told = [f"{METRICS[m].label} {value_text(values[m], m)}" for m in SHOWN if m in values]
        lines += [f"  {', '.join(names[result.plan.id])}: {result.plan.words}", f"      {', '.join(told)}"]
    return "\n".join(lines)


def _bytes(size: float) -> str:
    return units.format(size, "bytes")
