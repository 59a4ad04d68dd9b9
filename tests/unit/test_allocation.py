"""The allocation of bits against trying every combination, and how long it takes at the size of a 70B model."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest

from knowledge_base.errors import BadInput, NoFeasiblePlan
from search.allocation import allocate_bits


def made_up(modules: int, seed: int, bits: tuple[int, ...] = (4, 8, 16)) -> dict:
    """Sensitivities as they look when measured: halved errors for each bit, spread over orders of magnitude."""
    chance = random.Random(seed)
    found = {}
    for number in range(modules):
        params = chance.choice((65_536, 196_608, 262_144))
        scale = 10 ** chance.uniform(-5, -2)
        found[f"layers.{number}"] = {
            str(b): {
                "loss_increase": 0.0 if b == 16 else scale * 4.0 ** (4 - b) * chance.uniform(0.5, 2),
                "bytes": params * b // 8 + (0 if b == 16 else params // 16), "params": params,
            }
            for b in bits
        }  # fmt: skip
    return found


def brute_force(found: dict, budget: float) -> float:
    best = math.inf
    for choice in itertools.product(*(c.values() for c in found.values())):
        if sum(c["bytes"] for c in choice) <= budget:
            best = min(best, sum(c["loss_increase"] for c in choice))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average_bits", [4.6, 5.0, 6.5, 9.0, 40.0])
def test_equals_trying_every_combination(seed, average_bits):
    found = made_up(7, seed)
    budget = sum(c["4"]["params"] for c in found.values()) * average_bits / 8
    answer = allocate_bits(found, average_bits=average_bits)
    assert answer.bytes <= budget
    assert answer.bytes == sum(found[m][str(b)]["bytes"] for m, b in answer.bits.items())
    assert answer.average_bits <= average_bits
    assert answer.loss_increase_nats == pytest.approx(brute_force(found, budget), rel=1e-6, abs=1e-12)
    assert answer.status == "optimal"


def test_a_budget_in_bytes_is_the_same_budget():
    found = made_up(6, 1)
    params = sum(c["4"]["params"] for c in found.values())
    assert allocate_bits(found, budget_bytes=params * 6 / 8) == allocate_bits(found, average_bits=6.0)


def test_more_bytes_never_lose_more():
    found = made_up(40, 3)
    losses = [allocate_bits(found, average_bits=b).loss_increase_nats for b in (4.5, 5, 6, 7, 8, 10, 16)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0.0


def test_tight_and_too_tight():
    found = made_up(5, 2)
    smallest = sum(c["4"]["bytes"] for c in found.values())
    assert set(allocate_bits(found, budget_bytes=smallest).bits.values()) == {4}
    with pytest.raises(NoFeasiblePlan, match=f"takes {smallest}, short by 1\n") as caught:
        allocate_bits(found, budget_bytes=smallest - 1)
    assert "4.50 bits" in caught.value.hint


def test_a_matrix_that_cannot_be_at_4_bits_keeps_what_it_can():
    found = made_up(4, 5)
    del found["layers.2"]["4"]
    answer = allocate_bits(found, average_bits=9.0)
    assert answer.bits["layers.2"] in (8, 16)


@pytest.mark.parametrize("budget", [{}, {"budget_bytes": 1, "average_bits": 5.0}])
def test_exactly_one_budget(budget):
    with pytest.raises(BadInput, match="exactly one"):
        allocate_bits(made_up(2, 0), **budget)


def test_a_large_model_takes_seconds():
    found = made_up(80 * 7, 11)
    began = time.monotonic()
    answer = allocate_bits(found, average_bits=5.0)
    assert time.monotonic() - began < 20  # 0.2 to 2 s on two cores; room for a busy machine
    assert answer.average_bits == pytest.approx(5.0, abs=0.01)  # the budget is used
    assert set(answer.bits.values()) <= {4, 8, 16}
