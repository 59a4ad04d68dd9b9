"""How much the published figures say a method changes a resource: the median factor, with its range and its count."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from knowledge_base.field.entries import EvidenceMetric, EvidenceRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude:
    """What rows of evidence say together. Factors of what is needed: 0.5 is half, 2 is twice; their median and quartiles.

    Rows differ in model, hardware and baseline: this is a summary of what was published, not a prediction.
    """

    factor: float
    low: float  # first quartile
    high: float  # third quartile
    rows: int
    models: int


def factor(row: EvidenceRow, metric: EvidenceMetric) -> float | None:
    """Return after / before of what is needed: value / baseline where lower is better, else baseline / value.

    None where the source gives no baseline, or a ratio makes no sense (zero, negative).
    """
    if row.baseline is None or row.baseline <= 0 or row.value <= 0:
        return None
    return row.value / row.baseline if metric.better == "lower" else row.baseline / row.value


def magnitudes(rows: Iterable[EvidenceRow], metrics: Mapping[str, EvidenceMetric]) -> dict[str, Magnitude]:
    """Return, for each resource that some rows are about, what they say together."""
    factors: dict[str, list[float]] = {}
    models: dict[str, set[str]] = {}
    for row in rows:
        metric = metrics[row.metric]
        if (found := factor(row, metric)) is not None:
            factors.setdefault(metric.resource, []).append(found)
            models.setdefault(metric.resource, set()).add(row.model)
    return {
        resource: Magnitude(
            factor=statistics.median(found), low=_quartile(found, 0), high=_quartile(found, 2),
            rows=len(found), models=len(models[resource]),
        )
        for resource, found in factors.items()
    }  # fmt: skip


def _quartile(values: list[float], which: int) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[which] if len(values) > 1 else values[0]
