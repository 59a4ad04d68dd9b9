"""Predictions against measurements: how far off, how well ranked, how honest the intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from knowledge_base.metrics import METRICS
from knowledge_base.types import Estimate, Measurement


def error_report(pairs: Iterable[tuple[Estimate, Measurement]]) -> dict[str, dict[str, float]]:
    """Return, for each metric, how predictions fared against measured figures of the same plans.

    `n` pairs; `median_abs_ratio` and `worst_abs_ratio` of |predicted / measured - 1| (for quality loss, of the
    difference of perplexity ratios); `coverage`: share of measured values inside the predicted interval (0.8 is
    promised); `rank_correlation`: Spearman's, absent below 3 pairs or when one side does not vary. Nothing measured, as
    of an answer that came in one piece, is nothing to compare with.
    """
    columns: dict[str, list[tuple[float, float, float, float]]] = {}
    for estimate, measurement in pairs:
        if measurement.failure is not None:
            continue
        for name, value in estimate.values.items():
            figure = measurement.figures.get(name)
            if figure is not None and figure.source == "measured" and figure.value + _shift(name) > 0:
                columns.setdefault(name, []).append((value.mid, value.low, value.high, figure.value))
    return {name: _row(name, np.array(columns[name])) for name in METRICS if name in columns}


def _row(name: str, table: np.ndarray) -> dict[str, float]:
    mid, low, high, measured = table.T
    shift = _shift(name)
    errors = np.abs((mid + shift) / (measured + shift) - 1)
    slack = 1e-9 * np.abs(measured)
    row: dict[str, float] = {
        "n": len(table),
        "median_abs_ratio": float(np.median(errors)),
        "worst_abs_ratio": float(np.max(errors)),
        "coverage": float(np.mean((low - slack <= measured) & (measured <= high + slack))),
    }
    if len(table) >= 3 and np.ptp(mid) > 0 and np.ptp(measured) > 0:
        row["rank_correlation"] = spearman(mid, measured)
    return row


def _shift(name: str) -> float:
    return 1.0 if name == "quality_loss_ratio" else 0.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's rank correlation, ties given their mean rank.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0])), 2)
    0.5
    """
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[index]


def as_text(report: Mapping[str, Mapping[str, float]]) -> str:
    """Return the report as lines of a table for people."""
    lines = [f"{'metric':26} {'n':>4} {'median':>8} {'worst':>8} {'covered':>8} {'rank':>6}"]
    for name, row in report.items():
        rank = f"{row['rank_correlation']:6.2f}" if "rank_correlation" in row else "     -"
        lines.append(
            f"{name:26} {row['n']:4.0f} {row['median_abs_ratio']:8.1%} {row['worst_abs_ratio']:8.1%} {row['coverage']:8.0%} {rank}"
        )
    return "\n".join(lines)
