"""The machine's roofline with the plan's operators on it: what they read and compute, how fast, and under which roof.

Williams et al. 2009, doi:10.1145/1498765.1498785. The roofs are the machine's own rates; the dashed ones are what the
engine is predicted to reach with the plan's weight format. A point above the sloping roof reads from a cache.
"""

from __future__ import annotations

import math
from typing import Literal, TypedDict

from knowledge_base.errors import BadInput
from knowledge_base.types import Plan, Workload
from planner.estimating.drawing import Curve, Picture, Point, Ticks, lines, svg
from planner.estimating.pricing import ByOperators, Priced
from planner.estimating.waterfall import Bound, TimePart, waterfall


class Operator(TypedDict):
    """One group of operators as a point."""

    phase: Literal["prefill", "decode"]
    name: str
    flop_per_byte: float  # arithmetic intensity
    flop_per_s: float  # predicted to be reached
    roof_flop_per_s: float  # what the machine could reach at that intensity
    share: float  # of the phase's time
    bound: Bound


class Roofline(TypedDict):
    """A machine's roofs, and a plan's operators under them."""

    model: str
    hardware: str
    device: str
    plan: Plan
    words: str  # the plan in words
    workload: Workload
    memory_bytes_per_s: float  # with the plan's threads
    peak_flop_per_s: float  # of the dtype the plan computes with
    compute_dtype: str
    reached_bytes_per_s: float  # when reading weights in the plan's format
    reached_flop_per_s: float  # in matrix products
    operators: list[Operator]
    off_the_roofline: dict[str, dict[str, float]]  # phase -> what does not both read and compute -> share of its time


def roofline(priced: Priced) -> Roofline:
    """Return the roofs and the points of a priced plan.

    Raises:
        BadInput: the engine is known by its law, which does not tell operators apart.
    """
    if not isinstance(priced, ByOperators):
        raise BadInput(
            f"the law of {priced.asked.engine} does not tell operators apart, so there is no roofline of them",
            hint="draw one of an engine of: leanplan ls engines", where="--roofline",
        )  # fmt: skip
    asked, rates, fall = priced.asked, priced.case.rates, waterfall(priced)
    memory, peak = float(rates.bytes_per_s[0]), float(rates.peak_flop_per_s[0])
    found: list[Operator] = []
    off = {}
    for phase, parts in (("prefill", fall["prefill"]), ("decode", fall["decode"])):
        on = [p for p in parts if p["flop"] and (p["read_bytes"] or 0.0) >= 1]
        found += [_operator(phase, part, memory, peak) for part in on]  # type: ignore[arg-type]
        off[phase] = {p["name"]: p["share"] for p in parts if p not in on}
    return Roofline(
        model=asked.model.name, hardware=asked.hardware.name, device=asked.hardware.device.name, plan=priced.plan,
        words=priced.plan.words, workload=asked.workload, memory_bytes_per_s=memory, peak_flop_per_s=peak,
        compute_dtype=priced.demand.compute_dtype, reached_bytes_per_s=float(rates.weights_bytes_per_s[0]),
        reached_flop_per_s=float(rates.flop_per_s[0]), operators=found, off_the_roofline=off,
    )  # fmt: skip


def _operator(phase: Literal["prefill", "decode"], part: TimePart, memory: float, peak: float) -> Operator:
    flop, read_bytes = part["flop"] or 0.0, part["read_bytes"] or 0.0
    intensity = flop / read_bytes
    return Operator(
        phase=phase, name=part["name"], flop_per_byte=intensity, flop_per_s=flop / part["time_s"],
        roof_flop_per_s=min(peak, intensity * memory), share=part["share"], bound=part["bound"],
    )  # fmt: skip


def head(facts: Roofline) -> list[str]:
    """Return the machine in a few lines."""
    ridge = facts["peak_flop_per_s"] / facts["memory_bytes_per_s"]
    return [
        f"{facts['device']}: reads {_si(facts['memory_bytes_per_s'])}B/s, computes {_si(facts['peak_flop_per_s'])}flop/s in {facts['compute_dtype']}",
        f"reached with {facts['words']}: {_si(facts['reached_bytes_per_s'])}B/s of weights, {_si(facts['reached_flop_per_s'])}flop/s",
        f"below {ridge:.3g} flop for each byte read, reading binds; above it, arithmetic",
    ]


def as_text(facts: Roofline, *, ascii_only: bool) -> str:
    """Return the machine, the operators as a table, and the picture in characters."""
    from planner.cli.ls import table

    rows = [
        {
            "phase": o["phase"], "operators": o["name"], "share": f"{o['share']:.0%}",
            "flop/byte": f"{o['flop_per_byte']:.3g}", "reached": f"{_si(o['flop_per_s'])}flop/s",
            "of the roof": f"{o['flop_per_s'] / o['roof_flop_per_s']:.0%}", "": o["bound"],
        }
        for o in facts["operators"]
    ]  # fmt: skip
    title = f"{facts['model']} on {facts['hardware']}  ({facts['words']})"
    return "\n".join(
        [title, *head(facts), "", table(rows), *notes(facts), "", *lines(picture(facts), ascii_only=ascii_only)]
    )


def as_svg(facts: Roofline) -> str:
    """Return the picture as an SVG."""
    title = f"{facts['model']} on {facts['hardware']}: {facts['words']}"
    return svg(title, [picture(facts)], [*head(facts), *notes(facts)])


def notes(facts: Roofline) -> list[str]:
    """Return what of the time is not on the picture."""
    return [
        f"not on the picture: {share:.0%} of {phase}, {name}"
        for phase, parts in facts["off_the_roofline"].items()
        for name, share in parts.items()
        if share >= 0.005
    ]


def picture(facts: Roofline) -> Picture:
    """Return the roofs and points on logarithmic axes with whole decades at their ends."""
    memory, peak = facts["memory_bytes_per_s"], facts["peak_flop_per_s"]
    reads, computes = facts["reached_bytes_per_s"], facts["reached_flop_per_s"]
    ridge = peak / memory
    across = _decades([*(o["flop_per_byte"] for o in facts["operators"]), ridge])
    up = _decades([*(o["flop_per_s"] for o in facts["operators"]), across[0] * memory, peak])

    def at(flop_per_byte: float, flop_per_s: float) -> tuple[float, float]:
        return _share(flop_per_byte, across), _share(flop_per_s, up)

    def roof(bytes_per_s: float, flop_per_s: float) -> list[tuple[float, float]]:
        corners = (across[0], flop_per_s / bytes_per_s, across[1])
        return [at(i, min(flop_per_s, i * bytes_per_s)) for i in corners]

    return Picture(
        title="flop/s", across="flop for each byte read", across_ticks=_ticks(across), up_ticks=_ticks(up),
        curves=[
            Curve(points=roof(memory, peak), text="the machine's rates"),
            Curve(points=roof(reads, computes), text="reached by the engine", line="reached"),
        ],
        points=[
            Point(at=at(o["flop_per_byte"], o["flop_per_s"]), text=f"{o['name']} ({o['phase']})")
            for o in facts["operators"]
        ],
    )  # fmt: skip


def _decades(values: list[float]) -> tuple[float, float]:
    """Return the whole decades around some values, with room beside them."""
    return 10.0 ** math.floor(math.log10(min(values) / 2)), 10.0 ** math.ceil(math.log10(max(values) * 2))


def _share(value: float, ends: tuple[float, float]) -> float:
    return math.log(value / ends[0]) / math.log(ends[1] / ends[0])


def _ticks(ends: tuple[float, float]) -> Ticks:
    low, high = (round(math.log10(end)) for end in ends)
    return [(_share(10.0**d, ends), _si(10.0**d).strip()) for d in range(low, high + 1)]


def _si(value: float) -> str:
    """Return a number with an SI prefix: `3.35 T`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "
