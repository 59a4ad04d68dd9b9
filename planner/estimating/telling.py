"""What `leanplan estimate` prints of one plan: figures with intervals and reasons, then the waterfall as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Estimate, Plan, Workload
from planner.estimating.comparing import load_words
from planner.estimating.drawing import bar
from planner.estimating.pricing import PEAK, ByOperators, Priced, does_not_fit
from planner.estimating.waterfall import PHASES, MemoryPart, TimePart, Waterfall, waterfall

BAR = 30  # characters of the widest bar


class StepEffect(TypedDict):
    """What one step changes."""

    step: str
    effect: str


class MemoryNeeded(TypedDict):
    """Peak memory where it is held. Null: not predicted, for nothing published tells of it."""

    devices: int
    each_device_bytes: float | None  # null where the model runs on the host's processor
    each_device_limit_bytes: float | None
    host_bytes: float | None
    host_limit_bytes: float | None  # null where nothing tells it


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
    memory: MemoryNeeded
    coverage: float  # of the intervals
    notes: list[str]  # what must be known to read the figures
    waterfall: Waterfall


def estimated(priced: Priced) -> Estimated:
    """Return the data of one plan."""
    asked = priced.asked
    return Estimated(
        model=asked.model.name, hardware=asked.hardware.name, plan=priced.plan, words=priced.plan.words,
        workload=asked.workload, predicted=priced.estimate,
        not_predicted={name: problem.message for name, problem in priced.prevented.items()},
        steps=_effects(priced), fits=priced.fits, memory=_memory(priced), coverage=priced.coverage,
        notes=list(priced.notes), waterfall=waterfall(priced),
    )  # fmt: skip


def _memory(priced: Priced) -> MemoryNeeded:
    hardware, peak = priced.asked.hardware, priced.values[PEAK].mid
    host = None if hardware.host_assumed else float(hardware.host_memory_bytes)
    if hardware.device.kind == "cpu":
        return MemoryNeeded(devices=1, each_device_bytes=None, each_device_limit_bytes=None, host_bytes=peak, host_limit_bytes=host)  # fmt: skip
    count = sum(device == hardware.device for device in hardware.devices)
    return MemoryNeeded(
        devices=count, each_device_bytes=peak if isinstance(priced, ByOperators) else peak / count,
        each_device_limit_bytes=float(hardware.device.memory_bytes), host_bytes=None, host_limit_bytes=host,
    )  # fmt: skip


def _effects(priced: Priced) -> list[StepEffect]:
    import itertools

    from cost_models.demand import demand_chain

    if not isinstance(priced, ByOperators):
        return []
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
        f"{load_words(workload)}; intervals hold {facts['coverage'] * 100:.0f} %",
        sources(predicted),
        *facts["notes"],
        "",
    ]
    lines += [f"  {item['step']}: {item['effect']}" for item in facts["steps"]]
    lines += [""] if facts["steps"] else []
    for name, metric in METRICS.items():
        if (value := predicted.values.get(name)) is not None:
            mid, low, high = (units.format(v, metric.dimension) for v in (value.mid, value.low, value.high))
            p95 = f"p95 {units.format(value.p95, metric.dimension)}" if value.p95 not in (None, value.mid) else ""
            told = "; ".join(filter(None, (p95, value.because)))
            lines.append(f"  {metric.label:15} {mid:>15}  {f'[{low} – {high}]':32} {told}".rstrip())
        elif name in facts["not_predicted"]:
            lines.append(f"  {metric.label:15} {'not predicted':>15}  {facts['not_predicted'][name]}")
    lines += ["", *bars(facts["waterfall"], priced, ascii_only=ascii_only), *held(facts["memory"])]
    if not priced.fits:
        timed = len(priced.values) > len(priced.holding)
        lines += ["", does_not_fit(priced) + ("; the times above hold only where it does" if timed else "")]
    return "\n".join(lines)


def sources(predicted: Estimate) -> str:
    """Return where the figures come from, what most share first: `analytic; quality_loss published`."""
    by_source: dict[str, list[str]] = {}
    for name, value in predicted.values.items():
        by_source.setdefault(value.source, []).append(METRICS[name].label)
    usual, *others = sorted(by_source, key=lambda source: -len(by_source[source]))
    told = [f"{', '.join(by_source[source])} {source}" for source in others]
    return f"sources: {'; '.join((usual, *told))}"


def held(memory: MemoryNeeded) -> list[str]:
    """Return where the memory is held, for devices of their own."""
    each, limit = memory["each_device_bytes"], memory["each_device_limit_bytes"]
    if each is None or limit is None:
        return []
    of = f"each of {memory['devices']} devices" if memory["devices"] > 1 else "the device"
    return [
        f"on {of}: {units.format(each, 'bytes')} of {units.format(limit, 'bytes')}; "
        "the host's own is not predicted: nothing published tells of it"
    ]  # fmt: skip


def bars(fall: Waterfall, priced: Priced, *, ascii_only: bool) -> list[str]:
    """Return the waterfall as lines: every part begins where the one above it ends."""
    titles = {"prefill": "prefill, to the first token", "decode": "decode, each token after it"}
    lines = []
    for phase, metric in PHASES.items():
        parts: Sequence[TimePart] = fall["prefill"] if phase == "prefill" else fall["decode"]
        if not parts:
            continue
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
