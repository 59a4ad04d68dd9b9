"""Pareto mathematics: arrays in, indices and numbers out. Every cost is minimised."""

from __future__ import annotations

import numpy as np


def front(costs: np.ndarray) -> np.ndarray:
    """Return the indices of the undominated rows, in order. Equal rows are all kept.

    A row dominates another when it is nowhere worse and somewhere better.

    Args:
        costs: (plans, objectives), smaller is better, finite.
    """
    costs = np.asarray(costs, dtype=float)
    # Sorting by the sum first means a dominator always comes before what it dominates.
    order = np.lexsort((np.arange(len(costs)), costs.sum(axis=1)))
    kept: list[int] = []
    bank = np.empty((0, costs.shape[1]))
    for index in order:
        row = costs[index]
        if len(bank) and np.any(np.all(bank <= row, axis=1) & np.any(bank < row, axis=1)):
            continue
        kept.append(int(index))
        bank = np.vstack([bank, row])
    return np.array(sorted(kept), dtype=int)


def shortfall(costs: np.ndarray, loose: np.ndarray) -> np.ndarray:
    """Return (plans,): how much less all loose costs of a row would have to be at once for no other row to be better.

    Negative for the undominated, where it is what they may lose. Where no cost is loose, infinite for the dominated.

    Args:
        costs: (plans, objectives), smaller is better, finite; the loose ones as logarithms where shares matter.
        loose: (objectives,) of bool.

    >>> shortfall(np.array([[1.0, 5.0], [2.0, 6.0], [3.0, 4.0]]), np.array([True, False])).tolist()
    [-inf, 1.0, -inf]
    """
    costs = np.asarray(costs, dtype=float)
    found = np.full(len(costs), -np.inf)
    for i, row in enumerate(costs):
        others = np.delete(costs, i, axis=0)
        firm = np.all(others[:, ~loose] <= row[~loose], axis=1)
        if loose.any():
            needed = (row[loose] - others[:, loose]).min(axis=1)
        else:
            needed = np.where(np.any(others < row, axis=1), np.inf, -np.inf)
        found[i] = needed[firm].max(initial=-np.inf)
    return found


def hypervolume(costs: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume dominated by `costs` and bounded by `reference` (Zitzler & Thiele 1998).

    Exact, by slicing along the last objective; meant for fronts of up to a few hundred rows and 4 objectives.

    Args:
        costs: (plans, objectives), smaller is better.
        reference: (objectives,), worse than every row that should count.

    >>> hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([3.0, 3.0]))
    3.0
    """
    costs, reference = np.asarray(costs, dtype=float), np.asarray(reference, dtype=float)
    costs = costs[np.all(costs < reference, axis=1)]
    if not len(costs):
        return 0.0
    if costs.shape[1] == 1:
        return float(reference[0] - costs.min())
    costs = costs[front(costs)]
    costs = costs[np.argsort(costs[:, -1], kind="stable")]
    edges = np.append(costs[:, -1], reference[-1])
    return float(
        sum(
            (edges[i + 1] - edges[i]) * hypervolume(costs[: i + 1, :-1], reference[:-1])
            for i in range(len(costs))
            if edges[i + 1] > edges[i]
        )
    )


def knee(costs: np.ndarray) -> int:
    """Return the index of the row nearest to the ideal point after each objective is scaled to 0..1."""
    costs = np.asarray(costs, dtype=float)
    low, high = costs.min(axis=0), costs.max(axis=0)
    scaled = (costs - low) / np.where(high > low, high - low, 1.0)
    return int(np.argmin(np.linalg.norm(scaled, axis=1)))
