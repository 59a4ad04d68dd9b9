"""Multi-objective TPE (Ozaki et al. 2020) through Optuna, the budgets as constraints."""

from __future__ import annotations

from dataclasses import replace

from search.effort import Effort
from search.problem import Priced, Problem
from search.solvers._optuna import propose

SOLVER = "TPE: learns which settings make good plans; fewer, better proposals than NSGA-II, each ten times dearer"


def solve(problem: Problem, *, effort: Effort, seed: int = 0) -> Priced:
    """Return the distinct plans TPE proposed, priced. Asks for a third of NSGA-II's trials: each costs more."""
    import optuna

    sampler = optuna.samplers.TPESampler(multivariate=True, seed=seed, n_startup_trials=effort.population)
    return propose(problem, sampler, replace(effort, trials=effort.trials // 3))
