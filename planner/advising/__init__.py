"""What `leanplan advise` says of a model on a machine: what binds, what relieves it, what conflicts. Predicted; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knowledge_base import rules
from knowledge_base.registry import techniques
from knowledge_base.types import Hardware, Model, Step, Workload
from planner.advising.binding import Bound, Excess, bounds, excesses, limits, scarce
from planner.advising.helping import Helper, Remedy, helpers, remedies
from planner.advising.known import KnownMethod, OtherAttention, known_methods, other_attention
from planner.forecast import Outlook, as_result
from planner.results import PlanResult, Rejection


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What is known of a model on a machine without running anything."""

    model: Model
    hardware: Hardware
    workload: Workload
    notes: tuple[str, ...]
    limits: tuple[str, ...]  # "quality_loss <= 5 %": of the spec's budgets, those that can be predicted
    binding: str  # the resource to save first
    target: str  # the metric whose saving relieves it
    needed_bytes: float  # highest memory of the unchanged model
    memory_bytes: float  # what there is
    excesses: tuple[Excess, ...]  # limits the unchanged model breaks, the worst first
    bounds: tuple[Bound, ...]  # what a request waits for, the most binding first
    parts: Mapping[str, str]  # metric -> what it is made of
    remedies: tuple[Remedy, ...]  # short plans that relieve what binds, the best first
    helpers: tuple[Helper, ...]  # techniques alone
    known: tuple[KnownMethod, ...]  # methods for the same resource that Leanplan cannot execute yet
    attention: tuple[OtherAttention, ...]  # what other attentions would save on prompts of this length
    conflicts: tuple[str, ...]
    left_out: tuple[Rejection, ...]
    best: Mapping[str, PlanResult]  # by what they are best at
    tightest: Mapping[str, str]  # where no plan fits: budget -> the tightest limit that could be kept beside the others


def advice(outlook: Outlook) -> Advice:
    """Return the advice for an outlook."""
    excess, bound = excesses(outlook), bounds(outlook)
    binding, target = scarce(excess, bound)
    alone, steps = helpers(outlook)
    resource = binding if excess else "computation"
    return Advice(
        model=outlook.model, hardware=outlook.hardware, workload=outlook.spec.workload, notes=outlook.notes,
        limits=limits(outlook), binding=binding, target=target, needed_bytes=outlook.unchanged.values["peak_memory_bytes"].mid,
        memory_bytes=outlook.memory_bytes, excesses=excess, bounds=bound,
        parts={name: outlook.unchanged.values[name].because for name in ("ttft_s", "tpot_s", "peak_memory_bytes")},
        remedies=remedies(outlook, target, pressed=bool(excess)), helpers=alone,
        known=known_methods(resource, outlook.model, outlook.spec.workload, outlook.hardware),
        attention=other_attention(outlook.model, outlook.spec.workload.prompt_tokens),
        conflicts=_conflicts(steps, outlook),
        left_out=outlook.refused, best=_best(outlook), tightest=_tightest(outlook),
    )  # fmt: skip


def _conflicts(steps: list[Step], outlook: Outlook) -> tuple[str, ...]:
    """Return what the composition rules say against these steps together, once each; alternatives of one family left out."""
    families = [techniques.get(step.technique).TECHNIQUE.family for step in steps]
    known = rules.composition().knowing(
        rules.facts(model=outlook.model, workload=outlook.spec.workload, hardware=outlook.hardware)
    )
    found: dict[str, None] = {}
    for i, first in enumerate(steps):
        for j, second in enumerate(steps[:i]):
            if families[i] != families[j] and (why := known.conflict([second, first])):
                found[why] = None
    return tuple(found)


def _best(outlook: Outlook) -> dict[str, PlanResult]:
    """Return the plans predicted best within the budgets, by name."""
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


def _tightest(outlook: Outlook) -> dict[str, str]:
    clashing = outlook.contradictions()
    return {budget.label: said for budget in clashing if (said := outlook.tightest(budget)) is not None}
