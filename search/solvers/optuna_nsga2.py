"""NSGA-II (Deb et al. 2002) through Optuna, the budgets as constraints."""

from __future__ import annotations

from search.effort import Effort
from search.problem import Priced, Problem
from search.solvers._optuna import propose

SOLVER = "NSGA-II: a population evolves under the budgets; for spaces too large to list"


def solve(problem: Problem, *, effort: Effort, seed: int = 0) -> Priced:
    """Return the distinct plans NSGA-II proposed, priced."""
    import optuna

    return propose(problem, optuna.samplers.NSGAIISampler(population_size=effort.population, seed=seed), effort)
