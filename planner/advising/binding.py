"""What binds: the budgets the unchanged model breaks and by how much, and what one of its requests waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from knowledge_base import units
from knowledge_base.metrics import METRICS
from planner.forecast import Outlook

RELIEF: Mapping[str, Mapping[str, float]] = {  # what twice as much of a thing does to the machine's rates
    "memory bandwidth": {"bytes_per_s": 2, "streamed_bytes_per_s": 2, "kv_bytes_per_s": 2},
    "arithmetic": {"flop_per_s": 2, "peak_flop_per_s": 2},
    "engine overhead": {"kernel_s": 0.5, "step_s": 0.5},
}
HIDDEN = 2.0  # two things bind together where relief of both saves so many times what the better of them saves alone,
WORTH_TELLING = 0.05  # and at least this share of a request


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """One limit the unchanged model breaks. `times`: how far beyond it is, 2 is twice what is allowed."""

    metric: str
    resource: str
    times: float
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One thing a request waits for. `saved`: the share of its time that twice as much of it would save."""

    resource: str
    saved: float
    sentence: str


def limits(outlook: Outlook) -> tuple[str, ...]:
    """Return the budgets that advice stays within, also those nobody wrote."""
    return tuple(
        f"{budget.label} {'<=' if budget.bound == 'max' else '>='} {units.format(limit, METRICS[budget.metric].dimension)}"
        for budget in outlook.binding
        if (limit := outlook.limit(budget)) is not None
    )


def excesses(outlook: Outlook) -> tuple[Excess, ...]:
    """Return the limits the unchanged model is predicted to break, the worst first: budgets, and the machine's memory."""
    found = []
    for budget in outlook.binding:
        limit, value = outlook.limit(budget), outlook.unchanged.values[budget.metric].mid
        if limit is not None and (beyond := _times(value, limit, budget.bound)) > 1:
            reaches, asks = ("reaches", "asks for") if budget.bound == "min" else ("needs", "allows")
            found.append(_excess(budget.metric, beyond, reaches, value, f"the budget {asks}", limit))
    peak = outlook.unchanged.values["peak_memory_bytes"].mid
    if peak > outlook.memory_bytes and not any(e.metric == "peak_memory_bytes" for e in found):
        times = peak / outlook.memory_bytes
        found.append(_excess("peak_memory_bytes", times, "needs", peak, "the machine has", outlook.memory_bytes))
    return tuple(sorted(found, key=lambda excess: -excess.times))


def _times(value: float, limit: float, bound: str) -> float:
    over, under = (value, limit) if bound == "max" else (limit, value)
    return over / under if under > 0 else float(over > under) * 1e9


def _excess(metric: str, times: float, reaches: str, value: float, asks: str, limit: float) -> Excess:
    known = METRICS[metric]
    sentence = (
        f"{known.label}: the unchanged model {reaches} {units.format(value, known.dimension)}, {asks} "
        f"{units.format(limit, known.dimension)}: {float(f'{times:.2g}'):,g} times as much"
    )
    return Excess(metric=metric, resource=known.resource, times=times, sentence=sentence)


def bounds(outlook: Outlook) -> tuple[Bound, ...]:
    """Return what a request of the unchanged model waits for, told by what twice as much of it would save; most first.

    Where the device and the host that feeds it take about equally long, more of one alone saves nothing: then pairs
    are told too.
    """
    from cost_models.calibration import Features
    from cost_models.case import case_of
    from cost_models.demand import chains
    from cost_models.predict import evaluate

    workload, plan = outlook.spec.workload, outlook.space.unchanged()
    nodes = [chains(outlook.model, workload).node(plan)]
    case = case_of(nodes, workload, outlook.hardware)

    def latency_s(names: Sequence[str]) -> float:
        factors = {rate: factor for name in names for rate, factor in RELIEF[name].items()}
        rates = {name: factor * getattr(case.rates, name) for name, factor in factors.items()}
        changed = replace(case, rates=replace(case.rates, **rates))
        return float(evaluate(changed, None, Features(nodes))["latency_s"].mid.sum())

    device = outlook.hardware.device
    said = {
        "memory bandwidth": f"it reads at most {device.memory_bytes_per_s / 1e9:,.0f} GB/s; twice that",
        "arithmetic": f"it multiplies at most {case.rates.peak_flop_per_s[0] / 1e9:,.0f} Gflop/s; twice that",
        "engine overhead": f"{plan.engine} spends time starting operators; half of that time",
    }
    whole = latency_s(())

    def bound(names: Sequence[str]) -> Bound:
        saved = 1 - latency_s(names) / whole
        what = said[names[0]] if len(names) == 1 else "one hides behind the other; relief of both"
        return Bound(resource=" and ".join(names), saved=saved, sentence=f"{what} would save {saved:.0%} of a request")

    alone = {name: bound([name]) for name in RELIEF}
    together = [
        both
        for pair in combinations(RELIEF, 2)
        if (both := bound(pair)).saved >= max(WORTH_TELLING, *(HIDDEN * alone[name].saved for name in pair))
    ]
    return tuple(sorted([*alone.values(), *together], key=lambda bound: -bound.saved))


def scarce(excess: Sequence[Excess], bound: Sequence[Bound]) -> tuple[str, str]:
    """Return (what binds, the metric whose saving relieves it): the worst excess, else what requests wait for."""
    if excess:
        return excess[0].resource, excess[0].metric
    return bound[0].resource, "latency_s"
