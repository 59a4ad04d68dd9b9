"""The allocation against trying every combination, its laws, and how long it takes at the size of a 70B model."""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge_base.errors import BadInput, EnvironmentProblem, NoFeasiblePlan
from search.allocation import GAP, LOSS, allocate, useful

SHAPES = (65_536, 196_608, 262_144)


def made_up(matrices: int, seed: int, bits: tuple[int, ...] = (2, 4, 8, 16)) -> dict:
    """Sensitivities as they look when measured: halved errors for each bit, spread over orders of magnitude."""
    chance = random.Random(seed)
    found = {}
    for number in range(matrices):
        params = chance.choice(SHAPES)
        scale = 10 ** chance.uniform(-5, -2)
        found[f"layers.{number}"] = {
            str(b): {
                LOSS: 0.0 if b == 16 else scale * 4.0 ** (4 - b) * chance.uniform(0.5, 2),
                "bytes": params * b // 8 + (0 if b == 16 else params // 16), "params": params,
                "seconds": params * 1e-10 * (2.5 if b == 2 else b / 4) * chance.uniform(0.9, 1.1),
            }
            for b in bits
        }  # fmt: skip
    return found


def many_options(matrices: int, options: int, seed: int) -> dict:
    """Options of any size and loss, most of them no good."""
    chance = random.Random(seed)
    return {
        f"layers.{number}": {
            f"o{i}": {
                LOSS: 10 ** chance.uniform(-6, -2),
                "bytes": chance.randint(1, 16) * SHAPES[number % 3] // 8,
                "seconds": chance.uniform(1e-6, 1e-4),
            }
            for i in range(options)
        }
        for number in range(matrices)
    }


def total(found: dict, chosen: dict, what: str) -> float:
    return sum(found[m][o][what] for m, o in chosen.items())


def brute_force(found: dict, budgets: dict, ties=()) -> float:
    """Return the least loss within the budgets, infinity where nothing is."""
    best = math.inf
    for names in itertools.product(*found.values()):
        chosen = dict(zip(found, names))
        broken = any(len({chosen[m] == o for m, o in tie}) > 1 for tie in ties)
        if not broken and all(total(found, chosen, what) <= budget for what, budget in budgets.items()):
            best = min(best, total(found, chosen, LOSS))
    return best


# ---------------------------------------------------------------- what is best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("average_bits", [2.6, 4.6, 6.5, 9.0, 40.0])
def test_equals_trying_every_combination(seed, average_bits):
    found = made_up(5, seed)
    budget = sum(c["4"]["params"] for c in found.values()) * average_bits / 8
    answer = allocate(found, {"bytes": budget})
    assert answer.takes["bytes"] == total(found, answer.chosen, "bytes") <= budget
    assert answer.loss_increase_nats == pytest.approx(brute_force(found, {"bytes": budget}), rel=1e-6, abs=1e-12)
    assert answer.optimal


@pytest.mark.parametrize("seed", range(4))
def test_two_budgets_at_once(seed):
    found = made_up(5, seed)
    size, seconds = (sum(c["8"][what] for c in found.values()) for what in ("bytes", "seconds"))
    for share in (0.6, 0.8):
        budgets = {"bytes": share * size, "seconds": share * seconds}
        answer = allocate(found, budgets)
        assert all(answer.takes[what] <= budget for what, budget in budgets.items())
        assert answer.loss_increase_nats == pytest.approx(brute_force(found, budgets), rel=1e-6)
        # Each budget holds something back: the two answers to one of them alone break the other, or are this one.
        assert answer.loss_increase_nats >= allocate(found, {"bytes": budgets["bytes"]}).loss_increase_nats * (1 - GAP)


def test_ties_are_taken_whole_or_not_at_all():
    found = made_up(4, 7, bits=(4, 8))
    for matrix, choices in found.items():
        choices["removed"] = {LOSS: 1e-4, "bytes": 0, "seconds": 0.0, "params": choices["4"]["params"]}
        choices["removed"][LOSS] = 1e-7 if matrix == "layers.0" else 3e-3
    ties = [[("layers.0", "removed"), ("layers.1", "removed")], [("layers.2", "8"), ("layers.3", "8")]]
    for average_bits in (2.0, 3.0, 4.5, 5.5, 7.0):
        budget = average_bits / 8 * sum(c["4"]["params"] for c in found.values())
        answer = allocate(found, {"bytes": budget}, ties=ties)
        assert answer.loss_increase_nats == pytest.approx(brute_force(found, {"bytes": budget}, ties), rel=1e-6)
        for tie in ties:
            assert len({answer.chosen[m] == o for m, o in tie}) == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_never_worse_than_the_best_uniform_choice_that_fits(seed, share):
    found = made_up(9, seed)
    uniform = {b: dict.fromkeys(found, b) for b in ("2", "4", "8", "16")}
    sizes = {b: total(found, chosen, "bytes") for b, chosen in uniform.items()}
    budget = sizes["2"] + share * (sizes["16"] - sizes["2"])
    answer = allocate(found, {"bytes": budget})
    best = min(total(found, uniform[b], LOSS) for b, size in sizes.items() if size <= budget)
    assert answer.loss_increase_nats <= best * (1 + GAP)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_more_of_a_budget_never_loses_more(seed):
    found = made_up(20, seed)
    seconds = sum(c["2"]["seconds"] for c in found.values())
    for what, at_least in (("bytes", sum(c["2"]["bytes"] for c in found.values())), ("seconds", seconds)):
        losses = [allocate(found, {what: at_least * more}).loss_increase_nats for more in (1.0, 1.3, 1.8, 3, 7)]
        for tight, wide in itertools.pairwise(losses):
            assert wide <= tight * (1 + GAP)
    assert allocate(found, {"bytes": 1e12}).loss_increase_nats == 0.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tied=st.sets(st.integers(0, 19), max_size=3))
def test_what_is_left_out_is_beaten_by_what_stays(seed, tied):
    (choices,) = many_options(1, 20, seed).values()
    tied = {f"o{i}" for i in tied}
    kept = useful(choices, ("bytes", "seconds"), tied)
    assert tied <= set(kept)
    for option in choices.keys() - set(kept):
        beaten = (
            all(choices[other][w] <= choices[option][w] for w in (LOSS, "bytes", "seconds"))
            for other in set(kept) - tied
        )
        assert any(beaten)


# ---------------------------------------------------------------- what is refused


def test_tight_and_too_tight():
    found = made_up(5, 2)
    smallest = sum(c["2"]["bytes"] for c in found.values())
    assert set(allocate(found, {"bytes": smallest}).chosen.values()) == {"2"}
    with pytest.raises(NoFeasiblePlan, match=f"takes {smallest}, short by 1\n"):
        allocate(found, {"bytes": smallest - 1})


def test_budgets_that_only_together_are_too_tight():
    found = {"a": {"s": {LOSS: 1, "bytes": 1, "seconds": 9}, "f": {LOSS: 1, "bytes": 9, "seconds": 1}}}
    with pytest.raises(NoFeasiblePlan, match="at once"):
        allocate(found, {"bytes": 5, "seconds": 5})


def test_a_matrix_that_cannot_be_at_4_bits_keeps_what_it_can():
    found = made_up(4, 5, bits=(4, 8, 16))
    del found["layers.2"]["4"]
    smallest = sum(min(choice["bytes"] for choice in choices.values()) for choices in found.values())
    assert allocate(found, {"bytes": smallest}).chosen["layers.2"] == "8"


@pytest.mark.parametrize(
    ("options", "budgets", "message"),
    [
        ({}, {"bytes": 1}, "needs measured sensitivities"),
        (made_up(2, 0), {}, "needs measured sensitivities"),
        (made_up(2, 0), {"memory": 1}, "`2` of layers.0 does not tell its memory"),
    ],
)
def test_what_is_missing_is_named(options, budgets, message):
    with pytest.raises(BadInput, match=message):
        allocate(options, budgets)


def test_ties_may_be_lists_as_json_has_them():
    found = made_up(2, 0)
    tie = [["layers.0", "2"], ["layers.1", "2"]]
    answer = allocate(found, {"bytes": sum(c["2"]["bytes"] for c in found.values())}, ties=[tie])
    assert set(answer.chosen.values()) == {"2"}


def test_a_tie_to_nothing_is_refused():
    with pytest.raises(BadInput, match=r"`3` of layers\.0"):
        allocate(made_up(2, 0), {"bytes": 1e9}, ties=[[("layers.0", "3"), ("layers.1", "4")]])


# ---------------------------------------------------------------- at size


@pytest.mark.parametrize("budgets", [("bytes",), ("bytes", "seconds")])
def test_80_layers_of_7_matrices_of_20_options_take_seconds(budgets):
    found = many_options(80 * 7, 20, 11)
    middle = {w: sum(sorted(c[w] for c in cs.values())[10] for cs in found.values()) / 2 for w in budgets}
    began = time.monotonic()
    answer = allocate(found, middle, time_limit_s=20)
    assert time.monotonic() - began < 25  # room for a busy machine
    assert answer.gap < 1e-3
    assert all(0.95 * middle[w] < answer.takes[w] <= middle[w] for w in budgets[:1])


def test_little_time_tells_what_it_may_have_missed():
    found = many_options(200, 20, 5)
    limits = {w: sum(sorted(c[w] for c in cs.values())[2] for cs in found.values()) for w in ("bytes", "seconds")}
    best = allocate(found, limits, time_limit_s=30)
    try:
        quick = allocate(found, limits, time_limit_s=0.2)
    except EnvironmentProblem as error:  # a busy machine: not even one was found
        assert "more time" in error.hint
        return
    assert best.loss_increase_nats <= quick.loss_increase_nats * (1 + GAP)
    assert quick.loss_increase_nats * (1 - quick.gap) <= best.loss_increase_nats * (1 + GAP)
    assert quick.optimal == (quick.gap <= GAP)
