"""Axes: from a metric's figures to shares of a length, and the few round numbers written along it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from knowledge_base import units
from knowledge_base.metrics import METRICS

LOG_FROM = 12  # figures that differ by more than this factor are drawn on a logarithmic axis
MARGIN = 0.06  # of the length, kept free at both ends
MOST_TICKS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One metric's axis. `at` gives the share of its length, 0 at the low end; both may lie outside 0..1."""

    metric: str
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, metric: str, values: Iterable[float]) -> Axis:
        """Return an axis that shows all values, with a margin."""
        known = [v for v in values if math.isfinite(v)] or [0.0]
        low, high = min(known), max(known)
        log = low > 0 and high / low > LOG_FROM
        if log:
            spread = math.log(high / low) * MARGIN
            return cls(metric=metric, low=low * math.exp(-spread), high=high * math.exp(spread), log=True)
        spread = (high - low or abs(high) or 1.0) * MARGIN
        return cls(metric=metric, low=low - spread, high=high + spread, log=False)

    def at(self, value: float) -> float:
        """Return where a value lies, as a share of the axis, rounded to what a screen can show."""
        if self.log:
            if value <= 0:
                return -1.0
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(max(-1.0, min(2.0, share)), 4)

    def ticks(self) -> list[tuple[float, str]]:
        """Return (share, text) of a few round values inside the axis."""
        dimension = METRICS[self.metric].dimension
        size = _unit_size(dimension, max(abs(self.low), abs(self.high)))
        values = (
            _decades(self.low, self.high) if self.log else [v * size for v in _steps(self.low / size, self.high / size)]
        )
        return [(self.at(v), units.format(v, dimension)) for v in values]


def _unit_size(dimension: str, value: float) -> float:
    """Return one of the unit in which the value is written, so that steps are round numbers of it."""
    kind = units.DIMENSIONS[dimension]
    fitting = [float(kind.units[u]) for u in kind.shown if float(kind.units[u]) <= value]
    return max(fitting, default=float(kind.units[kind.shown[0]]))


def _steps(low: float, high: float) -> list[float]:
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        values = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(values) <= MOST_TICKS:
            return values
    return values[:: math.ceil(len(values) / MOST_TICKS)]
