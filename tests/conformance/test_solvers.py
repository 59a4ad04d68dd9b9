"""Laws of every solver: legal, feasible and undominated by what it found; seeded; near the exhaustive oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

import search
from knowledge_base import rules
from knowledge_base.types import Budget
from search.choose import choose
from search.effort import EFFORTS
from search.pareto import front, hypervolume
from search.problem import Priced, Problem
from search.solvers import registry
from search.space import build_space

ONLY = ("weight_int8", "weight_int4", "drop_layers", "prune_wanda", "weight_gguf", "kv_cache_quantised")
SOLVERS = registry.names()


@pytest.fixture(scope="module")
def problem() -> Problem:
    space = build_space(
        TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, engine_names=("transformers", "llama_cpp"), only=ONLY, executable=False
    )
    budget = Budget(metric="quality_loss_ratio", statistic="mean", bound="max", value=0.15)
    return Problem(
        model=TOY_MODEL, workload=TOY_WORKLOAD, hardware=TOY_MACHINE, space=space, budgets=(budget,),
        objectives=("tpot_p50", "peak_memory", "quality_loss"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def truth(problem: Problem) -> Priced:
    return search.solve(problem, solver="exhaustive")


def good(priced: Priced) -> np.ndarray:
    return np.flatnonzero(priced.violations() <= 0)


def volume(priced: Priced, reference: np.ndarray) -> float:
    return hypervolume(priced.costs()[good(priced)], reference)


def test_the_space_lists_each_legal_plan_once(problem: Problem, truth: Priced) -> None:
    assert len(set(truth.plans)) == len(truth.plans) <= problem.space.count()
    for plan in truth.plans:
        assert not rules.conflict(plan.steps)
        assert not rules.missing(plan.steps)
        assert plan.steps == tuple(rules.order(plan.steps))


@pytest.mark.parametrize("name", SOLVERS)
def test_proposals_are_legal_and_include_the_unchanged_model(name: str, problem: Problem, truth: Priced) -> None:
    found = search.solve(problem, solver=name, effort="quick")
    assert set(found.plans) <= set(truth.plans)
    assert any(not plan.steps for plan in found.plans)
    assert len(set(found.plans)) == len(found.plans)


@pytest.mark.parametrize("name", SOLVERS)
def test_it_finds_nearly_the_volume_of_the_oracle(name: str, problem: Problem, truth: Priced) -> None:
    reference = truth.costs().max(axis=0) * 1.01
    found = search.solve(problem, solver=name, effort="quick")
    assert volume(found, reference) >= 0.9 * volume(truth, reference)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_same_seed_gives_the_same_plans(name: str, problem: Problem) -> None:
    first, again = (search.solve(problem, solver=name, effort="quick", seed=3).plans for _ in range(2))
    assert first == again


@pytest.mark.promise("P2")
def test_picks_are_new_hopeful_and_explained(problem: Problem, truth: Priced) -> None:
    known = set(truth.plans[:5])
    picks = choose(truth, 6, known=known)
    assert len(picks) == 6
    assert len({p.plan for p in picks}) == 6
    hope = dict(zip(truth.plans, truth.violations("best")))
    for pick in picks:
        assert pick.plan not in known
        assert hope[pick.plan] <= 0
        assert pick.why
    undominated = {truth.plans[good(truth)[i]] for i in front(truth.costs()[good(truth)])}
    assert picks[0].plan in undominated | known


def test_with_impossible_budgets_the_nearest_are_picked(problem: Problem) -> None:
    impossible = replace(
        problem, budgets=(Budget(metric="peak_memory_bytes", statistic="mean", bound="max", value=1024.0),)
    )
    priced = search.solve(impossible, solver="exhaustive")
    picks = choose(priced, 2, known=set())
    assert all("no plan is predicted to meet the budgets" in p.why for p in picks)
    worst = dict(zip(priced.plans, priced.violations()))
    assert worst[picks[0].plan] == min(worst.values())


def test_efforts_only_grow() -> None:
    trials = [EFFORTS[name].trials for name in ("quick", "normal", "thorough")]
    assert trials == sorted(trials)
