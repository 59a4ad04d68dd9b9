"""Which plans are legal, which are good, and which to measure next.

`solve` prices plans and returns the good ones; `choose` picks the few worth measuring. Names load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.problem import Priced, Problem


def solve(problem: Problem, *, solver: str = "auto", effort: str = "quick", seed: int = 0) -> Priced:
    """Return priced plans, the predicted Pareto front among them.

    "auto" prices every legal plan while there are few enough for the effort, and else searches locally.

    Args:
        solver: "auto", or the name of a file in search/solvers that defines `solve`.
        effort: a key of search.effort.EFFORTS.
        seed: of every random choice; the same seed and problem give the same plans in the same order.
    """
    from search.effort import EFFORTS
    from search.solvers import registry

    if solver == "auto":
        solver = "exhaustive" if problem.space.count() <= EFFORTS[effort].exhaustive_plans else "local"
    return registry.get(solver).solve(problem, effort=EFFORTS[effort], seed=seed)
