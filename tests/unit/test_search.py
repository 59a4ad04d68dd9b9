"""How long plans may be, how plans grow in the local search, and which of them are worth measuring."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

import search
from knowledge_base.errors import BadInput
from knowledge_base.types import Budget, Plan, Step
from planner import spec as specs
from search.choose import (
    _doomed,
    _most_novel,
    added_volume,
    choose,
    gains_nothing,
    hopeful_steps,
    promising,
    same_fate,
)
from search.pareto import hypervolume
from search.problem import Problem
from search.solvers.local import neighbours
from search.space import Space, build_space

ONLY = ("weight_int8", "weight_int4", "drop_layers", "prune_width", "recover_lora", "kv_cache_quantised")


def space_of(max_steps: int | None = None) -> Space:
    return build_space(
        TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, engine_names=("transformers", "llama_cpp"), only=ONLY, executable=False,
        max_steps=max_steps,
    )  # fmt: skip


def problem_of(space: Space, loss: float = 0.15) -> Problem:
    budget = Budget(metric="quality_loss_ratio", statistic="mean", bound="max", value=loss)
    return Problem(
        model=TOY_MODEL, workload=TOY_WORKLOAD, hardware=TOY_MACHINE, space=space, budgets=(budget,),
        objectives=("artefact_size", "tpot_p50", "quality_loss"),
    )  # fmt: skip


@pytest.mark.parametrize("most", [0, 1, 2])
def test_no_plan_is_longer_than_is_allowed(most):
    space, free = space_of(most), space_of()
    assert set(space.each()) == {plan for plan in free.each() if len(plan.steps) <= most}
    families = [list(options.values()) for options in free.options.values()]
    listed = sum(
        len(list(itertools.product(*chosen)))
        for of_engine in families
        for length in range(most + 1)
        for chosen in itertools.combinations(of_engine, length)
    )
    assert space.count() == listed


def test_samplers_keep_to_the_length_too():
    for solver in ("optuna_nsga2", "local"):
        found = search.solve(problem_of(space_of(1)), solver=solver)
        assert max(len(plan.steps) for plan in found.plans) == 1


def test_a_spec_tells_the_length():
    asked = {"model": "models/tiny-lm", "budgets": {"peak_memory": "2 GiB"}}
    assert specs.from_mapping(asked).search.max_steps is None
    limited = specs.from_mapping({**asked, "search": {"max_steps": 1}})
    assert limited.search.max_steps == 1
    assert specs.from_mapping(specs.as_mapping(limited)) == limited
    with pytest.raises(BadInput):
        specs.from_mapping({**asked, "search": {"max_steps": 0}})


def test_neighbours_differ_in_one_family():
    space = space_of()
    int8, width, lora = Step("weight_int8"), Step("prune_width", {"keep": 0.75}), Step("recover_lora", {"steps": 60})
    plan = space.plan("transformers", (width, lora))
    assert plan is not None
    found = set(neighbours(space, plan))
    assert space.plan("transformers", (width, lora, int8)) in found
    assert space.plan("transformers", (width,)) in found
    assert space.plan("transformers", (Step("prune_width", {"keep": 0.5}), lora)) in found
    assert space.unchanged() not in found
    assert not any(other.steps == (lora,) for other in found), "recovery needs something to recover"


def test_the_local_search_finds_what_is_three_steps_away():
    problem = problem_of(space_of(), loss=0.4)
    truth, found = (search.solve(problem, solver=name) for name in ("exhaustive", "local"))
    reference = truth.costs().max(axis=0) * 1.01
    volumes = [hypervolume(p.costs()[p.violations() <= 0], reference) for p in (found, truth)]
    assert volumes[0] == pytest.approx(volumes[1], rel=1e-3)
    assert len(found.plans) < len(truth.plans)
    expected, _ = promising(truth)
    assert max(len(truth.plans[i].steps) for i in expected) >= 3, "else this shows nothing"


def test_added_volume_by_hand():
    costs = np.array([[0.0, 2.0], [2.0, 0.0], [1.0, 1.0]])  # scaled to 0, 0.5, 1; the volume ends at 1.1
    alone = added_volume(costs, np.empty((0, 2)))
    assert alone == pytest.approx([1.1 * 0.1, 1.1 * 0.1, 0.6 * 0.6])
    beside = added_volume(costs, np.array([[1.0, 1.0]]))
    assert beside == pytest.approx([0.5 * 0.1, 0.5 * 0.1, 0.0])


def test_of_plans_predicted_alike_the_shortest_is_measured():
    space = space_of()
    problem = problem_of(space, loss=1.0)
    plan = space.plan("transformers", (Step("weight_int4", {"group_size": 64}),))
    twin = space.plan(
        "transformers", (Step("weight_int4", {"group_size": 64}), Step("kv_cache_quantised", {"bits": 8}))
    )
    other = space.plan("transformers", (Step("weight_int8"),))
    assert plan and twin and other
    plans: list[Plan] = [space.unchanged(), twin, plan, other]
    priced = problem.price(plans)
    figures = {
        name: replace(v, **{end: getattr(v, end)[[0, 2, 2, 3]] for end in ("mid", "low", "high")}, p95=None)
        for name, v in priced.figures.items()
    }
    picks = choose(replace(priced, figures=figures), 1, known={space.unchanged(), other})
    assert [pick.plan for pick in picks] == [plan]
    for share, first in (
        (0.99, plan),
        (0.3, twin),
    ):  # the twin: a little worse in one, and a little or much better in another
        factors = {"quality_loss_ratio": 1.01, "tpot_s": share}
        better = {
            name: replace(
                v, **{end: getattr(v, end) * [1, factors.get(name, 1), 1, 1] for end in ("mid", "low", "high")}
            )
            for name, v in figures.items()
        }
        picks = choose(replace(priced, figures=better), 1, known={space.unchanged()})
        assert [pick.plan for pick in picks] == [first], share


def test_what_lost_all_it_knew_is_not_tried_again_with_other_ways_to_serve_it():
    bits, cache = Step("weight_int4", {"group_size": 64}), Step("kv_cache_quantised", {"bits": 4})
    threads, recovery = Step("thread_count", {"count": 1}), Step("recover_lora", {"steps": 20})

    def fate(steps: tuple[Step, ...], *collapsed: Step, engine: str = "transformers") -> bool:
        plan = Plan(model_digest="toy", engine=engine, steps=steps)
        return same_fate(plan, Plan(model_digest="toy", engine="transformers", steps=collapsed))

    assert fate((bits,), bits) and fate((bits, cache), bits) and fate((bits, threads), bits)
    assert fate((bits,), bits, threads)  # threads lose nothing: the bits did
    assert not fate((bits,), bits, cache) and not fate((cache,), bits, cache)  # either may have
    assert fate((bits, cache, threads), bits, cache)
    assert not fate((recovery, bits), bits)  # what is made in another way may be better
    assert not fate((bits,), bits, engine="llama_cpp") and not fate((), bits)

    space = space_of()
    first, second = (space.plan("transformers", steps) for steps in ((bits,), (bits, cache)))
    assert first and second
    problem = replace(problem_of(space, loss=1.0), objectives=("kv_memory", "quality_loss"))
    priced = problem.price([space.unchanged(), first, second])
    known = {space.unchanged(), first}
    assert [pick.plan for pick in choose(priced, 12, known=known)] == [second]
    assert choose(priced, 12, known=known, collapsed=[first]) == []


def test_what_is_predicted_to_lose_more_than_what_lost_all_is_not_tried():
    space = space_of()
    steps = (
        (),
        (Step("weight_int8"),),
        (Step("weight_int4", {"group_size": 128}),),
        (Step("drop_layers", {"count": 1, "by": "influence"}),),
    )
    unchanged, eight, four, fewer = plans = [p for s in steps if (p := space.plan("transformers", s)) is not None]
    priced = replace(problem_of(space, loss=9.0), objectives=("tpot_p50", "artefact_size")).price(plans)
    loss = priced.figures["quality_loss_ratio"].mid
    assert 0 < loss[1] < loss[2] < loss[3]

    assert _doomed(priced, [four]) == [False, False, True, False], "fewer layers lose in another way"
    assert _doomed(priced, [eight]) == [False, True, True, False]
    assert _doomed(priced, [fewer]) == [False, False, False, True]
    assert [pick.plan for pick in choose(priced, 1, known={unchanged, eight})] == [four]
    assert four not in {pick.plan for pick in choose(priced, 12, known={unchanged, eight}, collapsed=[eight])}


def test_what_lost_all_says_nothing_of_the_harm_another_family_does_or_of_another_engines_kernels():
    space = space_of()
    eight, four, fewer = (
        Step("weight_int8"),
        Step("weight_int4", {"group_size": 128}),
        Step("drop_layers", {"count": 1, "by": "influence"}),
    )
    gguf = {bits: Step("weight_gguf", {"type": type}) for bits, type in ((2, "q2_k"), (4, "q4_k"))}
    made = [("transformers", s) for s in ((four,), (eight,), (fewer,), (fewer, eight), (fewer, four))]
    made += [("llama_cpp", (step,)) for step in gguf.values()]
    plans = [p for engine, steps in made if (p := space.plan(engine, steps)) is not None]
    assert len(plans) == len(made)
    priced = problem_of(space, loss=9.0).price(plans)
    loss = dict(zip(plans, priced.figures["quality_loss_ratio"].mid))
    lost, mild, _, both, harsh, two_bits, four_bits = plans
    assert loss[mild] < loss[lost] < loss[both] and loss[lost] > 2 * loss[four_bits] and loss[two_bits] > 2 * loss[lost]

    doomed = dict(zip(plans, _doomed(priced, [lost])))
    assert not doomed[both], "int8 loses less than what lost all; that fewer layers lose more is another matter"
    assert doomed[harsh] and doomed[two_bits] and not doomed[four_bits]
    doomed = dict(zip(plans, _doomed(priced, [four_bits])))
    assert doomed[two_bits] and doomed[lost] and not doomed[mild]


def test_a_step_that_only_loses_is_not_measured_for_its_uncertainty():
    space = space_of()
    bits, cache = Step("weight_int4", {"group_size": 64}), Step("kv_cache_quantised", {"bits": 4})
    plans = [p for s in ((), (bits,), (cache,), (bits, cache)) if (p := space.plan("transformers", s)) is not None]
    problem = problem_of(space, loss=1.0)  # objectives: size, time per token, quality
    priced = problem.price(plans)
    assert gains_nothing(priced, range(4)) == [False, False, True, True]
    assert gains_nothing(priced.take(np.array([0, 3])), range(2)) == [False, False], "of two steps one gains"
    assert gains_nothing(priced, [3], failed={plans[1]}) == [False], "what failed is no reason against more steps"
    first, *_ = choose(problem.price([plans[0], plans[2]]), 1, known={plans[0]})
    assert first.plan == plans[2], "where nothing else may be tried it is"
    smaller_cache = replace(problem, objectives=("kv_memory", "quality_loss")).price(plans)
    assert gains_nothing(smaller_cache, range(4)) == [False, True, False, True]


def test_hopes_are_halved():
    """What would have to be as good as its optimistic end to be of use is no reason to measure it."""
    problem = problem_of(space_of(), loss=0.05)
    priced = search.solve(problem, solver="exhaustive")
    hope, mid = priced.violations("best"), priced.violations("mid")
    far = {plan for plan, h, m in zip(priced.plans, hope, mid) if h <= 0 < h + m}
    assert far, "else this shows nothing"
    assert not far & {pick.plan for pick in choose(priced, 12, known={problem.space.unchanged()})}


def test_one_novelty_at_a_time_is_tried():
    space = space_of()
    problem = problem_of(space, loss=1.0)
    priced = search.solve(problem, solver="exhaustive")
    known = [space.unchanged(), space.unchanged("llama_cpp")]
    for _ in range(2):
        first, novel = choose(priced, 2, known=known)
        assert novel.why == "unlike anything measured"
        tried = {step.technique for plan in (*known, first.plan) for step in plan.steps}
        assert len({step.technique for step in novel.plan.steps} - tried) == 1
        known.append(novel.plan)


def test_an_engine_nobody_measured_comes_before_a_technique():
    space = space_of()
    priced = search.solve(problem_of(space, loss=1.0), solver="exhaustive")
    seen, nothing = [space.unchanged("transformers")], np.empty((0, 3))
    everything = range(len(priced.plans))
    engine = priced.plans[_most_novel(priced, everything, seen, nothing)[0]]
    assert engine.engine == "llama_cpp" and len(engine.steps) == 1, "a step shows more of it than the model as it came"
    technique = priced.plans[_most_novel(priced, everything, [*seen, engine], nothing)[0]]
    assert len({step.technique for step in technique.steps} - {step.technique for step in engine.steps}) == 1


def test_no_plan_is_hoped_to_be_better_than_the_model_as_it_came():
    """The interval of a large loss is wide enough to reach below none, which is no reason to measure it."""
    problem = problem_of(space_of(), loss=0.1)
    priced = search.solve(problem, solver="exhaustive")
    loss = priced.figures["quality_loss_ratio"]
    wide = {**priced.figures, "quality_loss_ratio": replace(loss, low=np.full_like(loss.low, -0.99))}
    picks = {pick.plan for pick in choose(replace(priced, figures=wide), 12, known={problem.space.unchanged()})}
    lost = dict(zip(priced.plans, loss.mid))
    assert picks
    assert max(lost[plan] for plan in picks) <= 2 * 0.1


def test_a_step_is_hopeful_while_it_may_be_better_than_what_is_expected():
    def rewrites(step: Step) -> bool:
        return step.technique in ("drop_layers", "prune_width")

    tight = problem_of(space_of(), loss=0.02)
    priced = search.solve(tight, solver="exhaustive")
    found = hopeful_steps(priced, rewrites)
    promised = {step for i in np.union1d(*promising(priced)) for step in priced.plans[i].steps if rewrites(step)}
    assert set(found) > promised, "published losses beyond the budget are no reason not to try"
    assert {step.technique for step in found} == {"drop_layers", "prune_width"}
    assert len(found) == len(set(found)) and hopeful_steps(priced, lambda step: False) == []
    loss = priced.figures["quality_loss_ratio"]
    certain = replace(priced, figures={**priced.figures, "quality_loss_ratio": replace(loss, low=loss.mid)})
    assert set(hopeful_steps(certain, rewrites)) < set(found), "what surely loses too much is none"
