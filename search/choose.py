"""Which priced plans are worth a measurement: the predicted front, the uncertain, and the different."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from knowledge_base.types import Plan
from search.pareto import front
from search.problem import Priced


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A plan to measure next, and the reason in words."""

    plan: Plan
    why: str


def choose(
    priced: Priced,
    count: int,
    *,
    known: Collection[Plan],
    failed: Collection[Plan] = (),
    longest_build_s: float = float("inf"),
) -> list[Pick]:
    """Return up to `count` plans to measure next, best reason first.

    Only plans with a chance count: the optimistic end of every interval within the error budgets. Among them
    the picks alternate between (1) the plan of the predicted front nearest to the ideal by priority of
    objectives, (2) the most uncertain of the optimistic front, (3) the plan of either front least like
    anything measured. When no plan has a chance, the ones nearest to the budgets are picked: they show how far
    off the budgets are.

    Args:
        known: plans measured already; `failed`: those that did not work, whose kin are tried last.
        longest_build_s: plans predicted to take longer to build are left for a larger effort.
    """
    builds = priced.figures["build_s"].mid
    index = np.array(
        [i for i, p in enumerate(priced.plans) if p not in known and builds[i] <= longest_build_s], dtype=int
    )
    if not len(index) or count <= 0:
        return []
    candidates = priced.take(index)
    hope = candidates.violations("best")
    if np.all(hope > 0):
        nearest = np.argsort(candidates.violations("mid"), kind="stable")[:count]
        return [
            Pick(plan=candidates.plans[i], why="no plan is predicted to meet the budgets; nearest to them")
            for i in nearest
        ]
    candidates = candidates.take(np.flatnonzero(hope <= 0))
    likely = np.flatnonzero(candidates.violations("mid") <= 0)
    expected = likely[front(candidates.costs("mid")[likely])] if len(likely) else np.array([], dtype=int)
    optimistic = front(candidates.costs("best"))
    seen = [*known, *failed]
    picks: list[Pick] = []
    taken: set[int] = set()

    def take(pool: Iterable[int], score: np.ndarray, why: str) -> None:
        for i in sorted((int(i) for i in pool), key=lambda i: (score[i], i)):
            if i not in taken and len(picks) < count:
                taken.add(i)
                picks.append(Pick(plan=candidates.plans[i], why=why))
                return

    closeness = _distance_to_ideal(candidates.costs("mid"))
    doubt = -_width(candidates)
    pool = list(dict.fromkeys([*expected.tolist(), *optimistic.tolist()]))
    while len(picks) < min(count, len(pool)):
        before = len(picks)
        take(expected, closeness, "on the predicted front")
        strangeness = _strangeness(candidates, pool, [*seen, *(p.plan for p in picks)])
        take(pool, strangeness, "unlike anything measured")
        take(optimistic, doubt, "could be better than predicted: least certain")
        if len(picks) == before:
            break
    return picks


def _distance_to_ideal(costs: np.ndarray) -> np.ndarray:
    """Return (plans,): distance to the ideal point, objectives scaled to 0..1 and weighted 1, 1/2, 1/3 by priority."""
    low, high = costs.min(axis=0), costs.max(axis=0)
    scaled = (costs - low) / np.where(high > low, high - low, 1.0)
    return np.linalg.norm(scaled / np.arange(1, costs.shape[1] + 1), axis=1)


def _width(priced: Priced) -> np.ndarray:
    """Return (plans,): the summed relative width of the objectives' intervals."""
    total = np.zeros(len(priced.plans))
    for name in priced.problem.objective_metrics:
        values = priced.figures[name]
        total += (values.high - values.low) / np.maximum(np.abs(values.mid), 1e-12)
    return total


def _difference(plan: Plan, others: Sequence[Plan]) -> float:
    """Return how unlike the nearest other plan it is: a new technique counts 1, another engine 2, a knob 1/4."""
    if not others:
        return float("inf")
    names = {s.technique for s in plan.steps}
    steps = set(plan.steps)

    def distance(other: Plan) -> float:
        return (
            2.0 * (plan.engine != other.engine)
            + len(names ^ {s.technique for s in other.steps})
            + 0.25 * len(steps ^ set(other.steps))
        )

    return min(distance(other) for other in others)


def _strangeness(candidates: Priced, pool: Sequence[int], others: Sequence[Plan]) -> np.ndarray:
    """Return (plans,): minus the difference to the nearest other plan, worked out for the pool alone.

    Each step costs a little more than the difference a new technique and its setting make: one novelty at a
    time teaches what that novelty does, and is built sooner.
    """
    score = np.zeros(len(candidates.plans))
    for i in pool:
        score[i] = 1.3 * len(candidates.plans[i].steps) - _difference(candidates.plans[i], others)
    return score
