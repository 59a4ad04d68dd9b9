"""Which priced plans are worth a measurement: what adds to the predicted front, what may be better, what is different."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from knowledge_base.registry import techniques
from knowledge_base.types import Plan, Step
from search.pareto import front, hypervolume
from search.problem import Priced

NEARLY = 0.8  # of the most volume a plan adds
HALFWAY = 0.5
ENGINE_REACH = 1.6  # times the way to the optimistic end of an 80 % interval: one chance in fifty to be better yet
CLEARLY = 2.0  # times the loss of a plan that collapsed in another engine
SAME = 1e-9  # of a cost: sums of the same numbers in another order differ by less
BEYOND_WORST = 0.1  # of the range of each objective, that the point which bounds volumes lies beyond the worst


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A plan to measure next, and the reason in words."""

    plan: Plan
    why: str


def choose(
    priced: Priced,
    count: int,
    *,
    known: Collection[Plan],
    collapsed: Collection[Plan] = (),
    failed: Collection[Plan] = (),
    longest_build_s: float = float("inf"),
) -> list[Pick]:
    """Return up to `count` plans to measure next, best reason first.

    Only plans with a chance count: the optimistic end of every interval within the error budgets, and no lossy step is
    predicted to be for nothing (`gains_nothing`). Among them
    the picks alternate between (1) the plan of the predicted front that adds most volume to what is measured and
    picked, (2) one that tries what nothing measured has, (3) the one that adds most if half of what
    may be better than predicted is. When no plan has a chance, the ones nearest to the budgets are picked: they
    show how far off the budgets are.

    Args:
        known: plans measured already; `collapsed`: those of them that lost what the model knew, as others surely would
            (`same_fate`) or are predicted to; `failed`: all that have no figures.
        longest_build_s: plans predicted to take longer to build are left for a larger effort.
    """
    builds = priced.figures["build_s"].mid
    doomed = _doomed(priced, collapsed)
    index = np.array(
        [i for i, p in enumerate(priced.plans) if p not in known and builds[i] <= longest_build_s and not doomed[i]],
        dtype=int,
    )
    useful = index[~np.array(gains_nothing(priced, index.tolist(), failed=failed), dtype=bool)]
    if any(priced.plans[i].steps for i in useful) or any(plan.steps for plan in known):
        index = useful  # else nothing that may be tried promises anything: who asks for it wants to see it
    if not len(index) or count <= 0:
        return []
    candidates = _sober(priced.take(index))
    if np.all(candidates.violations("best") > 0):
        nearest = np.argsort(candidates.violations("mid"), kind="stable")[:count]
        return [
            Pick(plan=candidates.plans[i], why="no plan is predicted to meet the budgets; nearest to them")
            for i in nearest
        ]
    measured = priced.take(np.array([i for i, p in enumerate(priced.plans) if p in known], dtype=int))
    measured = measured.take(np.flatnonzero(measured.violations("mid") <= 0))
    expected, hoped = promising(candidates)
    pool = list(dict.fromkeys([*expected.tolist(), *hoped.tolist()]))
    likely_costs, hoped_costs = candidates.costs("mid"), _halfway_costs(candidates)
    picked: dict[int, str] = {}

    def take(ordered: Iterable[int], why: str) -> None:
        if len(picked) < count and (chosen := next((i for i in ordered if i not in picked), None)) is not None:
            picked[chosen] = why

    def by_volume(among: np.ndarray, costs: np.ndarray) -> list[int]:
        return _by_volume(candidates, among, costs, np.concatenate([measured.costs("mid"), costs[list(picked)]]))

    while len(picked) < min(count, len(pool)):
        take(by_volume(expected, likely_costs), "on the predicted front")
        others = [*known, *(candidates.plans[i] for i in picked)]
        there = np.concatenate([measured.costs("mid"), hoped_costs[list(picked)]])
        take(_most_novel(candidates, pool, others, there), "unlike anything measured")
        take(by_volume(hoped, hoped_costs), "could be better than predicted")
    return [Pick(plan=candidates.plans[i], why=why) for i, why in picked.items()]


def promising(priced: Priced) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of two fronts: of what is predicted, and of what may be half as much better as it can be.

    Each is of plans within the error budgets so told; where no plan is, the second is of all.
    """
    priced = _sober(priced)
    mid, best = priced.violations("mid"), priced.violations("best")
    likely, hopeful = np.flatnonzero(mid <= 0), np.flatnonzero(mid + best <= 0)
    if not len(hopeful):
        hopeful = np.arange(len(priced.plans))
    expected = likely[front(priced.costs("mid")[likely])] if len(likely) else likely
    return expected, hopeful[front(_halfway_costs(priced)[hopeful])]


def hopeful_steps(priced: Priced, wanted: Callable[[Step], bool]) -> list[Step]:
    """Return the steps wanted of plans that would be better than what is expected, lost they as little as can be.

    Those of most plans come first. What a step loses is found in seconds, so any chance will do: where that is only hoped
    halfway, as plans to measure are chosen, a technique whose published losses are far beyond a budget would never be tried.
    """
    priced = _sober(priced)
    expected, _ = promising(priced)
    loss = priced.figures["quality_loss_ratio"]
    gentle = replace(priced, figures={**priced.figures, "quality_loss_ratio": replace(loss, mid=loss.low)})
    chance = np.flatnonzero(gentle.violations("best") <= 0)
    hoped = gentle.costs("mid")[chance]
    beaten = np.zeros(len(chance), dtype=bool)
    for row in priced.costs("mid")[expected]:
        beaten |= (row <= hoped).all(axis=1)
    plans = Counter(step for i in chance[~beaten] for step in priced.plans[i].steps if wanted(step))
    return sorted(plans, key=lambda step: (-plans[step], str(step)))


def gains_nothing(priced: Priced, among: Sequence[int], *, failed: Collection[Plan] = ()) -> list[bool]:
    """Return for each of some plans whether it is predicted no better in anything than itself without one or two lossy steps.

    A step that only loses makes the loss uncertain besides; that is no hope. Two: what prepares for a step goes with it. A
    lossless step that is predicted to do nothing may do something: it has nothing else to be tried for. What failed is no
    reason against what has more steps.
    """
    rows = {(plan.engine, frozenset(plan.steps)): i for i, plan in enumerate(priced.plans) if plan not in failed}
    costs = np.column_stack([priced.costs("mid"), np.maximum(priced.violations("mid"), 0.0)])
    reached = costs + SAME * np.abs(costs)
    lossy = {
        name: not techniques.get(name).TECHNIQUE.lossless
        for name in {step.technique for i in among for step in priced.plans[i].steps}
    }

    def idle(plan: Plan, i: int) -> bool:
        steps = frozenset(plan.steps)
        left_out = (part for n in (1, 2) for part in combinations([s for s in plan.steps if lossy[s.technique]], n))
        parts = (rows.get((plan.engine, steps.difference(part))) for part in left_out)
        return any(j is not None and np.isfinite(costs[j]).all() and (costs[j] <= reached[i]).all() for j in parts)

    return [idle(priced.plans[i], i) for i in among]


def _sober(priced: Priced) -> Priced:
    """Return the plans without the hope to be better than the model as it came, which wide intervals of a loss reach."""
    loss = priced.figures["quality_loss_ratio"]
    no_gain = replace(loss, low=np.maximum(loss.low, np.minimum(loss.mid, 0.0)))
    return replace(priced, figures={**priced.figures, "quality_loss_ratio": no_gain})


def _doomed(priced: Priced, collapsed: Collection[Plan]) -> list[bool]:
    """Return for each plan whether one that collapsed says that it would lose all that the model knew, too.

    Either it is made of the same; or its steps of the families that one was lossy in are predicted to lose no less, by
    themselves: where 2 bits were too few for one format, they are for a format that does worse by its published figures.
    In another engine, whose kernels may be at fault or not, they are predicted to lose CLEARLY more.
    """
    if not collapsed:
        return [False] * len(priced.plans)
    loss = priced.figures["quality_loss_ratio"].mid
    alone = {(plan.engine, _lossy(plan)): loss[i] for i, plan in enumerate(priced.plans)}
    lost = [(plan.engine, _families(_lossy(plan)), loss[i]) for i, plan in enumerate(priced.plans) if plan in collapsed]

    def loses_as_much(plan: Plan) -> bool:
        for engine, families, most in lost:
            same = frozenset(step for step in _lossy(plan) if _families([step]) <= families)
            least = most if engine == plan.engine else CLEARLY * most
            if families and _families(same) == families and alone.get((plan.engine, same), 0.0) >= least:
                return True
        return False

    return [any(same_fate(plan, other) for other in collapsed) or loses_as_much(plan) for plan in priced.plans]


def _lossy(plan: Plan) -> frozenset[Step]:
    return frozenset(step for step in plan.steps if not techniques.get(step.technique).TECHNIQUE.lossless)


def _families(steps: Iterable[Step]) -> frozenset[str]:
    return frozenset(techniques.get(step.technique).TECHNIQUE.family for step in steps)


def same_fate(plan: Plan, collapsed: Plan) -> bool:
    """Return whether a plan is made of the same as one that lost what the model knew, so that it would lose it too.

    Other ways to serve an artefact repair nothing; where the collapsed plan's own way may lose quality, only that way counts.
    """
    made = {step for step in collapsed.steps if not _serves(step)}
    lossy = {step for step in collapsed.steps if not techniques.get(step.technique).TECHNIQUE.lossless}
    steps = set(plan.steps)
    return plan.engine == collapsed.engine and made | lossy <= steps and all(map(_serves, steps - made))


def _serves(step: Step) -> bool:
    return techniques.get(step.technique).TECHNIQUE.stage == "serve"


def _halfway_costs(priced: Priced) -> np.ndarray:
    """Return (plans, objectives): halfway from what is predicted to the optimistic ends."""
    return priced.costs("mid") + HALFWAY * (priced.costs("best") - priced.costs("mid"))


def added_volume(costs: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return (plans,): the volume each plan alone would add to what dominates already.

    Objectives are scaled by their range among the plans; the volume ends a little beyond the worst of them.

    Args:
        costs: (plans, objectives), smaller is better; `there`: (others, objectives).

    >>> added_volume(np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.0]])).tolist()
    [0.0, 0.0, 0.0]
    """
    if not len(costs):
        return np.zeros(0)
    low, high = costs.min(axis=0), costs.max(axis=0)
    spread = np.where(high > low, high - low, 1.0)
    scaled, others = (costs - low) / spread, (there - low) / spread
    reference = np.full(costs.shape[1], 1.0 + BEYOND_WORST)
    others = others[front(others)] if len(others) else others
    return np.array(
        [np.prod(reference - row) - hypervolume(np.maximum(others, row), reference) for row in scaled]
    ).clip(min=0.0)  # fmt: skip


def _difference(plan: Plan, others: Sequence[Plan]) -> float:
    """Return how unlike the nearest other plan it is: a new technique counts 1, another engine 2, a knob 1/4."""
    if not others:
        return float("inf")
    names = {s.technique for s in plan.steps}
    steps = set(plan.steps)

    def distance(other: Plan) -> float:
        return (
            2.0 * (plan.engine != other.engine)
            + len(names ^ {s.technique for s in other.steps})
            + 0.25 * len(steps ^ set(other.steps))
        )

    return min(distance(other) for other in others)


def _most_novel(candidates: Priced, pool: Sequence[int], seen: Sequence[Plan], there: np.ndarray) -> list[int]:
    """Return the indices of plans that would teach most, best first.

    An engine that no plan has that was seen comes before a technique: engines differ by more than techniques do, and what
    one plan shows of an engine holds for all of its plans, so a small chance is worth a measurement. Of its plans of one
    step or none the one that is predicted to be worth most shows it: the model as it came is rarely what one wants of it.
    Then they try one technique that no plan has, or as few as there are: what it does can then be told, and it is built
    sooner than a heap of them. Of these, those that may add most to what is there. Where nothing new may add anything, the
    plans of the pool come least like their nearest first.
    """
    known = {part for plan in seen for part in _parts(plan)}
    hopeful = np.flatnonzero(candidates.violations("mid") + candidates.violations("best") <= 0)
    likely, best = candidates.costs("mid"), candidates.costs("best")
    short = [i for i in hopeful if candidates.plans[i].engine not in known and len(candidates.plans[i].steps) <= 1]
    hoped = added_volume((likely + ENGINE_REACH * (best - likely))[short], there)
    if hoped.any():
        return _by_volume(candidates, np.array(short)[hoped > 0], likely, likely[:0])
    costs = likely + HALFWAY * (best - likely)
    new = np.array([len(_parts(candidates.plans[i]) - known) for i in hopeful], dtype=int)
    for number in sorted(set(new[new > 0].tolist())):
        few = hopeful[new == number]
        few = few[front(costs[few])]
        if added_volume(costs[few], there).any():
            return _by_volume(candidates, few, costs, there)
    differences = {i: _difference(candidates.plans[i], seen) - 1.3 * len(candidates.plans[i].steps) for i in pool}
    return sorted(pool, key=lambda i: -differences[i])


def _by_volume(candidates: Priced, among: np.ndarray, costs: np.ndarray, there: np.ndarray) -> list[int]:
    """Return plans by the volume they add to what is there, most first.

    Of those that add nearly as much as the best, the shortest comes first: predictions do not tell such plans apart, and
    what a short one does is known sooner and for more plans.
    """
    worth = added_volume(costs[among], there)
    steps = np.array([len(candidates.plans[i].steps) for i in among])
    near = worth >= NEARLY * worth.max(initial=0.0)
    return [int(among[k]) for k in np.lexsort((among, -worth, np.where(near, steps, 0), ~near))]


def _parts(plan: Plan) -> set[str]:
    return {plan.engine, *(step.technique for step in plan.steps)}
