"""Spending a budget over parts: near the best there is, never over it."""

import itertools
import random

from knowledge_base.techniques._allocation import allocate


def best_loss(parts, budget):
    """The least loss by trying everything."""
    keys = list(parts)
    choices = itertools.product(*(range(len(parts[k])) for k in keys))
    costs = [
        (sum(parts[k][i][0] for k, i in zip(keys, c)), sum(parts[k][i][1] for k, i in zip(keys, c))) for c in choices
    ]
    return min(loss for cost, loss in costs if cost <= budget)


def problem(seed):
    rng = random.Random(seed)
    parts = {}
    for name in "abcde":
        costs = itertools.accumulate(rng.randint(1, 4) for _ in range(4))
        parts[name] = list(zip(costs, sorted((rng.random() for _ in range(4)), reverse=True)))
    return parts


def test_the_budget_holds_and_the_loss_is_near_the_least():
    excess = []
    for seed in range(40):
        parts = problem(seed)
        budget = 28
        chosen = allocate(parts, budget)
        assert sum(parts[k][i][0] for k, i in chosen.items()) <= budget
        excess.append(sum(parts[k][i][1] for k, i in chosen.items()) / best_loss(parts, budget))
    assert sum(excess) / len(excess) < 1.08


def test_nothing_that_would_fit_is_left():
    for seed in range(40):
        parts = problem(seed)
        chosen = allocate(parts, 28)
        left = 28 - sum(parts[k][i][0] for k, i in chosen.items())
        assert all(p[j][0] - p[chosen[k]][0] > left for k, p in parts.items() for j in range(chosen[k] + 1, len(p)))


def test_a_budget_below_all_takes_the_cheapest():
    assert allocate({"a": [(5, 1.0), (6, 0.0)], "b": [(5, 1.0)]}, 3) == {"a": 0, "b": 0}
