"""What `leanplan estimate` prints of one plan: figures with intervals and reasons, then the waterfall as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Estimate, Plan, Workload
from planner.estimating.drawing import bar
from planner.estimating.pricing import PEAK, Priced, does_not_fit
from planner.estimating.waterfall import PHASES, MemoryPart, TimePart, Waterfall, waterfall

BAR = 30  # characters of the widest bar


class StepEffect(TypedDict):
    """What one step changes."""

    step: str
    effect: str


class Estimated(TypedDict):
    """What is predicted of one plan."""

    model: str
    hardware: str
    plan: Plan
    words: str  # the plan in words
    workload: Workload
    predicted: Estimate
    not_predicted: dict[str, str]  # metric -> why
    steps: list[StepEffect]
    fits: bool  # predicted peak memory is within the machine's limit
    waterfall: Waterfall


def estimated(priced: Priced) -> Estimated:
    """Return the data of one plan."""
    asked = priced.asked
    return Estimated(
        model=asked.model.name, hardware=asked.hardware.name, plan=priced.plan, words=priced.plan.words,
        workload=asked.workload, predicted=priced.estimate,
        not_predicted={name: problem.message for name, problem in priced.figures.prevented.items()},
        steps=_effects(priced), fits=priced.fits, waterfall=waterfall(priced),
    )  # fmt: skip


def _effects(priced: Priced) -> list[StepEffect]:
    import itertools

    from cost_models.demand import demand_chain

    chain = demand_chain(priced.plan, priced.asked.model, priced.asked.workload)
    return [
        StepEffect(step=name, effect="; ".join(after.because[len(before.because) :]))
        for (_, before), (name, after) in itertools.pairwise(chain)
    ]


def as_text(facts: Estimated, priced: Priced, *, ascii_only: bool) -> str:
    """Return the figures as lines for people: value, 80 % interval, what dominates it; then where they go."""
    plan, workload, predicted = facts["plan"], facts["workload"], facts["predicted"]
    lines = [
        f"predicted for {facts['model']} on {facts['hardware']}  ({plan.id}, {plan.words})",
        f"{workload.prompt_tokens} prompt + {workload.output_tokens} output tokens; intervals hold 80 %",
        "",
    ]
    lines += [f"  {item['step']}: {item['effect']}" for item in facts["steps"]]
    lines += [""] if facts["steps"] else []
    for name, metric in METRICS.items():
        if (value := predicted.values.get(name)) is not None:
            mid, low, high = (units.format(v, metric.dimension) for v in (value.mid, value.low, value.high))
            lines.append(f"  {metric.label:15} {mid:>15}  {f'[{low} – {high}]':32} {value.because}".rstrip())
        elif name in facts["not_predicted"]:
            lines.append(f"  {metric.label:15} {'not predicted':>15}  {facts['not_predicted'][name]}")
    lines += ["", *bars(facts["waterfall"], priced, ascii_only=ascii_only)]
    return "\n".join(
        lines if priced.fits else [*lines, "", f"{does_not_fit(priced)}; the times above hold only where it does"]
    )


def bars(fall: Waterfall, priced: Priced, *, ascii_only: bool) -> list[str]:
    """Return the waterfall as lines: every part begins where the one above it ends."""
    titles = {"prefill": "prefill, to the first token", "decode": "decode, each token after it"}
    lines = []
    for phase, metric in PHASES.items():
        parts: Sequence[TimePart] = fall["prefill"] if phase == "prefill" else fall["decode"]
        rows = [(p["name"], p["share"], units.format(p["time_s"], "time"), p["bound"]) for p in parts]
        lines += _section(titles[phase], units.format(priced.values[metric].mid, "time"), rows, ascii_only=ascii_only)
    stored: Sequence[MemoryPart] = fall["memory"]
    total = f"{units.format(priced.values[PEAK].mid, 'bytes')} of {units.format(priced.limit_bytes, 'bytes')}"
    sizes = [(p["name"], p["share"], units.format(p["memory_bytes"], "bytes"), "") for p in stored]
    return lines + _section("memory at its peak", total, sizes, ascii_only=ascii_only)[:-1]


def _section(title: str, total: str, rows: Sequence[tuple[str, float, str, str]], *, ascii_only: bool) -> list[str]:
    lines, before = [f"{title}: {total}"], 0.0
    for name, share, figure, bound in rows:
        drawn = bar(before, before + share, BAR, ascii_only=ascii_only)
        told = "<1%" if share < 0.005 else f"{share:.0%}"
        lines.append(f"  {name:33} {drawn} {told:>4} {figure:>9}  {bound}".rstrip())
        before += share
    return [*lines, ""]
