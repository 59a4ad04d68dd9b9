"""Spend one budget over many parts so that the sum of their losses is least: ranks, thresholds.

Each part has settings of rising cost and falling loss. Steps between them are taken in the order of what they gain for
their cost, as on the convex hulls of the parts; what is left is filled with steps that still fit. That is the best
there is up to one step, and takes no solver.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Point = tuple[float, float]  # cost, loss


def allocate(parts: Mapping[Key, Sequence[Point]], budget: float) -> dict[Key, int]:
    """Return the number of the chosen setting of each part; the cheapest of all where the budget does not cover more.

    >>> allocate({"a": [(1, 9.0), (2, 1.0), (3, 0.0)], "b": [(1, 5.0), (2, 4.0), (3, 0.0)]}, 5)
    {'a': 1, 'b': 2}
    """
    chosen = dict.fromkeys(parts, 0)
    left = budget - sum(points[0][0] for points in parts.values())
    steps = []
    for place, (key, points) in enumerate(parts.items()):
        at = 0
        while at < len(points) - 1:
            gain, to = max((_gain(points[at], point), -j) for j, point in enumerate(points[at + 1 :], at + 1))
            steps.append((-gain, place, at, -to, key))
            at = -to
    for _, _, at, to, key in sorted(steps, key=lambda step: step[:4]):
        cost = parts[key][to][0] - parts[key][at][0]
        if chosen[key] == at and cost <= left:
            chosen[key], left = to, left - cost
    while fitting := [
        (_gain(points[chosen[key]], point), -place, j, key)
        for place, (key, points) in enumerate(parts.items())
        for j, point in enumerate(points)
        if j > chosen[key] and point[0] - points[chosen[key]][0] <= left
    ]:
        _, _, to, key = max(fitting, key=lambda step: step[:3])
        left -= parts[key][to][0] - parts[key][chosen[key]][0]
        chosen[key] = to
    return chosen


def _gain(here: Point, there: Point) -> float:
    return (here[1] - there[1]) / (there[0] - here[0])
