"""Pareto local search (Paquete, Chiarandini and Stützle 2004): plans grow step by step from the best there are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from knowledge_base.types import Plan
from search.choose import promising
from search.effort import Effort
from search.problem import Priced, Problem
from search.space import Space

SOLVER = "changes each step of each plan on the predicted front until none gets better; for spaces too large to list"


def solve(problem: Problem, *, effort: Effort, seed: int = 0) -> Priced:
    """Return the plans that were priced on the way, as many as an exhaustive search may price. `seed` changes nothing.

    The plans whose neighbours are looked at are those that would be chosen from to be measured, were their engine the
    only one: what another engine is ahead of now may grow past it.
    """
    space = problem.space
    found = dict.fromkeys(space.unchanged(engine) for engine in space.options)
    explored: set[Plan] = set()
    while True:
        priced = problem.price(list(found))
        fronts = [plan for engine in space.options for plan in _front(priced, engine)]
        fresh = [plan for plan in fronts if plan not in explored]
        if not fresh or len(found) >= effort.exhaustive_plans:
            return priced
        for plan in fresh:
            if len(found) < effort.exhaustive_plans:
                found |= dict.fromkeys(neighbours(space, plan))
        explored.update(fresh)


def _front(priced: Priced, engine: str) -> Iterator[Plan]:
    """Yield the plans of an engine that would be chosen from to be measured."""
    own = priced.take(np.array([i for i, plan in enumerate(priced.plans) if plan.engine == engine]))
    yield from dict.fromkeys(own.plans[i] for indices in promising(own) for i in indices)


def neighbours(space: Space, plan: Plan) -> Iterator[Plan]:
    """Yield the legal plans that differ in one family: without its step, with another one, or with one more."""
    for steps in space.options[plan.engine].values():
        others = tuple(step for step in plan.steps if step not in steps)
        for changed in (others, *((*others, step) for step in steps)):
            if (neighbour := space.plan(plan.engine, changed)) is not None:
                yield neighbour
