"""The ask-and-tell loop the Optuna solvers share: proposals priced a population at a time, in memory."""

from __future__ import annotations

from typing import Any

from knowledge_base.metrics import METRICS
from knowledge_base.types import Plan, Step
from search.effort import Effort
from search.limits import binding
from search.problem import Priced, Problem
from search.space import Space


def propose(problem: Problem, sampler: Any, effort: Effort) -> Priced:
    """Return the distinct legal plans the sampler proposed, with the unchanged model's, priced."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = problem.space
    names = problem.objective_metrics
    study = optuna.create_study(
        directions=["minimize" if METRICS[name].better == "lower" else "maximize" for name in names], sampler=sampler
    )
    alphabet = _alphabet(space)
    for plan in _seeds(space):
        study.enqueue_trial(_as_params(plan, alphabet))
    found: dict[Plan, None] = {}
    for start in range(0, effort.trials, effort.population):
        trials = [study.ask() for _ in range(min(effort.population, effort.trials - start))]
        plans = [_suggest(trial, space, alphabet) for trial in trials]
        priced = problem.price(plans)
        broken = {b.label: priced.violation(b) for b in binding(problem.budgets)}
        for row, (trial, plan) in enumerate(zip(trials, plans)):
            found[plan] = None
            for label, column in broken.items():
                if column is not None:
                    trial.set_constraint(label, float(column[row]))
            study.tell(trial, [float(priced.figures[name].mid[row]) for name in names])
    return problem.price(list(found))


def _alphabet(space: Space) -> dict[str, dict[str, Step | None]]:
    """Return family -> {label: step}: every engine's options under one name, so that all trials share parameters."""
    alphabet: dict[str, dict[str, Step | None]] = {}
    for families in space.options.values():
        for family, steps in families.items():
            alphabet.setdefault(family, {"none": None}).update({str(step): step for step in steps})
    return alphabet


def _seeds(space: Space) -> list[Plan]:
    """Return each engine's unchanged plan and every single-step plan: a sampler should not have to find those."""
    plans = []
    for engine, families in space.options.items():
        for step in (None, *(s for steps in families.values() for s in steps)):
            if plan := space.plan(engine, () if step is None else (step,)):
                plans.append(plan)
    return plans


def _as_params(plan: Plan, alphabet: dict[str, dict[str, Step | None]]) -> dict[str, str]:
    chosen = {str(step) for step in plan.steps}
    return {"engine": plan.engine} | {
        family: next((label for label in labels if label in chosen), "none") for family, labels in alphabet.items()
    }


def _suggest(trial: Any, space: Space, alphabet: dict[str, dict[str, Step | None]]) -> Plan:
    """Return the trial's plan. A step the engine or a rule does not allow is dropped, so every trial is legal."""
    engine = trial.suggest_categorical("engine", list(space.options))
    steps: tuple[Step, ...] = ()
    for family, labels in alphabet.items():
        step = labels[trial.suggest_categorical(family, list(labels))]
        allowed = space.options[engine].get(family, ())
        if step is not None and step in allowed and space.fits(engine, (*steps, step)):
            steps = (*steps, step)
    while (plan := space.plan(engine, steps)) is None:
        steps = steps[:-1]
    return plan
