"""What a run will take and what it took: plans measured, time, memory, disk, downloads; the values and how they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from knowledge_base import units


class Kind(NamedTuple):
    """How an amount is told."""

    label: str
    dimension: str | None  # None: a plain count


AMOUNTS = {
    "candidates": Kind("plans measured", None),
    "wall_s": Kind("wall time", "time"),
    "peak_memory_bytes": Kind("peak memory", "bytes"),
    "peak_device_bytes": Kind("peak GPU memory", "bytes"),
    "disk_bytes": Kind("disk", "bytes"),
    "download_bytes": Kind("downloads", "bytes"),
}
STAGES = ("prepare", "unchanged", "build", "measure", "search", "finals")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """One thing a run takes: `low`, `mid` and `high` as forecast, in the unit of the amount's name.

    `prior` is the forecast before earlier runs corrected it, `fact` what the run took; None where nothing was observed.
    """

    low: float
    mid: float
    high: float
    prior: float
    because: str = ""
    fact: float | None = None

    @property
    def held(self) -> bool | None:
        """Whether the fact lies in the interval; None without a fact."""
        return None if self.fact is None else self.low <= self.fact <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForecast:
    """What a measured run takes, by name of AMOUNTS; afterwards each with its fact."""

    amounts: Mapping[str, Amount]
    stages_s: Mapping[str, Amount]  # what wall_s is made of, in s
    obstacles: tuple[str, ...] = ()  # why it cannot be done here: which limit, what to change

    @property
    def each_s(self) -> float:
        """Seconds one more candidate is expected to take."""
        count = max(1.0, self.amounts["candidates"].mid - 1)
        return (self.stages_s["build"].mid + self.stages_s["measure"].mid) / count

    def with_facts(self, facts: Mapping[str, float], stages_s: Mapping[str, float]) -> RunForecast:
        """Return the forecast beside what really happened."""
        return replace(
            self,
            amounts={name: replace(a, fact=facts.get(name)) for name, a in self.amounts.items()},
            stages_s={name: replace(a, fact=stages_s.get(name)) for name, a in self.stages_s.items()},
        )


class Row(NamedTuple):
    """One amount as every report shows it."""

    label: str
    forecast: str
    fact: str
    held: str
    because: str


def rows(forecast: RunForecast) -> list[Row]:
    """Return the amounts that are or were anything, as text."""
    told = []
    for name, kind in AMOUNTS.items():
        amount = forecast.amounts[name]
        if name == "peak_device_bytes" and not (amount.high or amount.fact):
            continue
        interval = "" if amount.low == amount.high else f" [{_text(amount.low, kind)} – {_text(amount.high, kind)}]"
        told.append(
            Row(
                label=kind.label, forecast=_text(amount.mid, kind) + interval,
                fact="–" if amount.fact is None else _text(amount.fact, kind),
                held={None: "–", True: "inside", False: "outside"}[amount.held], because=amount.because,
            )
        )  # fmt: skip
    return told


def in_short(forecast: RunForecast) -> str:
    """Return the forecast in a line."""
    return "expected: " + ", ".join(f"{row.label} {row.forecast}" for row in rows(forecast))


def as_text(forecast: RunForecast, *, stages: bool = False) -> str:
    """Return the forecast for people, a line for each amount; with `stages`, what the time is made of."""
    lines = [f"  {row.label:16} {row.forecast}  ({row.because})" for row in rows(forecast)]
    if stages:
        kind = AMOUNTS["wall_s"]
        lines += ["The time:"]
        lines += [
            f"  {name:16} {_text(a.mid, kind)} [{_text(a.low, kind)} – {_text(a.high, kind)}]  ({a.because})"
            for name, a in forecast.stages_s.items()
        ]
    lines += [f"It cannot be done here: {obstacle}." for obstacle in forecast.obstacles]
    return "\n".join(["This run is expected to take:", *lines])


def _text(value: float, kind: Kind) -> str:
    if kind.dimension is None:
        return f"{value:.0f}"
    return units.format(value, kind.dimension, digits=2) if value else "0"
