"""Another answer from what was measured already: changed budgets and objectives judge it anew. Nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_base.errors import BadInput
from knowledge_base.metrics import find_metric
from knowledge_base.serde import digest, plain
from knowledge_base.types import Budget, Estimate, Plan
from planner import answering
from planner.foreseeing import experience, foresee
from planner.judging import judge
from planner.predicting import infeasible, learned, prices
from planner.results import ParetoSet, PlanResult, load
from planner.run_forecast import RunForecast
from planner.store import Store

if TYPE_CHECKING:
    from planner.spec import Spec
    from search.problem import Priced, Problem

MOST_RUNS = 20  # earlier runs whose measurements are looked for
SHOWN = 5  # unmeasured plans that are told


def spec_of_run(answer: ParetoSet) -> Spec:
    """Return the spec a run was made by.

    Raises:
        BadInput: the run folder does not hold it.
    """
    from planner import spec as specs

    path = Path(answer.folder or answer.run_id) / "spec.yaml"
    if not path.is_file():
        raise BadInput("the run's spec.yaml is gone", where=str(path), hint="give the spec with --spec")
    return specs.load(path)


def with_budgets(spec: Spec, changed: Sequence[Budget]) -> Spec:
    """Return a spec with budgets added; one on the same figure is replaced."""
    asked = {(b.metric, b.statistic, b.bound) for b in changed}
    kept = [b for b in spec.budgets if (b.metric, b.statistic, b.bound) not in asked]
    return replace(spec, budgets=(*kept, *changed))


def replan(answer: ParetoSet, spec: Spec, *, run_root: Path, store: Path) -> ParetoSet:
    """Return the answer a run's measurements give under a spec's budgets and objectives, and what is worth measuring.

    Plans that other runs measured under the same conditions are judged too. `unmeasured` holds the plans predicted to be
    better than the measured ones, by predictions corrected by all measurements; `forecast` what measuring them takes.

    Raises:
        BadInput: the run measured nothing, or the spec has another workload, for which other figures hold.
    """
    from planner.forecast import sample
    from planner.preparing import legal_plans
    from search.problem import Problem

    if not answer.measured or answer.baseline is None or answer.baseline.measurement is None:
        raise BadInput(
            "that run measured nothing", where=answer.run_id, hint="leanplan plan --predict judges predictions"
        )
    if spec.workload != answer.workload:
        raise BadInput(
            "the spec has another workload than the run: its measurements hold for their own", where="workload",
            hint="leanplan plan SPEC measures with the new one",
        )  # fmt: skip
    space, refused = legal_plans(spec, answer.model, answer.hardware, predict=False)
    results, runs = _gathered(answer, run_root)
    reference = {name: f.value for name, f in answer.baseline.measurement.figures.items()}
    results = [
        r if answering.failed(r) else replace(
            r, verdicts=judge(spec.budgets, baseline=reference, measurement=r.measurement, ratios=r.ratios)
        )
        for r in results
    ]  # fmt: skip
    results = answering.mark_front(results, spec.objectives)
    best = answering.recommend(results, spec.objectives)
    good = [r.measurement for r in results if r.measurement and not answering.failed(r)]
    problem = Problem(
        model=answer.model, workload=answer.workload, hardware=answer.hardware, space=space, budgets=spec.budgets,
        objectives=spec.objectives, baseline=reference,
        calibration=learned((), answer.model, answer.workload, answer.hardware, good),
    )  # fmt: skip
    priced = sample(problem)
    unmeasured = _worth_measuring(spec, priced, results, reference)
    price = prices(problem, [r.plan for r in results if r.on_front])
    results = [replace(r, why=answering.reasons(r, results, price, spec.objectives)) for r in results]
    return replace(
        answer,
        run_id=f"replanned-{digest([answer.run_id, plain(spec.budgets), spec.objectives])[:8]}",
        budgets=spec.budgets, objectives=spec.objectives, results=tuple(results), unmeasured=tuple(unmeasured),
        recommended_id=best.plan.id if best else None,
        rejected=answering.rejections(results, refused, infeasible(priced)),
        sentence=answering.sentence(best, results, spec.objectives, measured=True),
        conflicts=() if best else answering.nearest(results, spec.budgets),
        search={**answer.search, "priced": len(priced.plans), "measured": len(results)},
        provenance={**answer.provenance, "replanned_from": runs},
        forecast=_of_measuring(spec, answer, problem, [r.plan for r in unmeasured], store),
    )  # fmt: skip


def _gathered(answer: ParetoSet, run_root: Path) -> tuple[list[PlanResult], list[str]]:
    """Return the run's results and those of other plans, measured by other runs under the same conditions; and the runs."""
    results, runs = {r.plan: r for r in answer.results}, [answer.run_id]
    for other in _alike(answer, run_root):
        fresh = [r for r in other.results if r.plan not in results and r.measurement is not None]
        results |= {r.plan: replace(r, artefact=None, finalist=False, ratios={}) for r in fresh}
        runs += [other.run_id] * bool(fresh)
    return list(results.values()), runs


def _alike(answer: ParetoSet, run_root: Path) -> Iterator[ParetoSet]:
    """Yield other finished runs of the same model, machine, workload, texts and versions, the newest first."""

    def conditions(of: ParetoSet) -> list[object]:
        kept = [of.provenance.get("data"), of.provenance.get("versions")]
        return [of.model.digest, of.hardware.fingerprint, of.workload, kept, _protocol(of)]

    paths = sorted(run_root.glob("*/result.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in paths[:MOST_RUNS]:
        if path.parent.is_symlink() or path.parent.name == Path(answer.folder or "").name:
            continue
        try:
            other = load(path.parent)
        except BadInput:
            continue  # damaged, or of another version: what is told is told by `leanplan ls runs`
        if other.measured and conditions(other) == conditions(answer):
            yield other


def _protocol(answer: ParetoSet) -> object:
    """Return how a run measured: the length of its screening."""
    seen = answer.baseline.measurement.protocol if answer.baseline and answer.baseline.measurement else {}
    return [seen.get(name) for name in ("requests", "least_s", "most_s", "seed")]


def _worth_measuring(
    spec: Spec, priced: Priced, results: Sequence[PlanResult], reference: dict[str, float]
) -> list[PlanResult]:
    """Return unmeasured plans that no measured plan within the budgets beats, by what is predicted of them.

    They are predicted to meet the budgets; where nothing measured does, those that may meet them count as well.
    """
    import cost_models
    from search.choose import choose

    problem = priced.problem
    collapsed = [r.plan for r in results if r.measurement and r.measurement.collapsed]
    picks = choose(priced, 2 * SHOWN, known={r.plan for r in results}, collapsed=collapsed)
    rivals = [r for r in results if r.on_front and r.feasible]
    fits = {end: dict(zip(priced.plans, priced.violations(end) <= 0, strict=True)) for end in ("mid", "best")}
    expected = [pick for pick in picks if fits["mid"][pick.plan]]
    if not expected and not rivals:
        expected = [pick for pick in picks if fits["best"][pick.plan]]
    found = []
    for pick in expected:
        estimate: Estimate = cost_models.estimate(
            pick.plan, problem.model, problem.workload, problem.hardware, problem.calibration
        )
        verdicts = judge(spec.budgets, baseline=reference, estimate=estimate)
        told = tuple(v for v in verdicts if v.outcome != "not judged")
        result = PlanResult(plan=pick.plan, estimate=estimate, verdicts=told, why=(pick.why,))
        if not any(_beats(rival, result, spec.objectives) for rival in rivals):
            found.append(result)
    return found[:SHOWN]


def _beats(rival: PlanResult, result: PlanResult, objectives: Sequence[str]) -> bool:
    """Whether a plan is at least as good by every objective both have a figure of."""
    for label in objectives:
        ours, theirs = answering.value_of(result, label), answering.value_of(rival, label)
        sign = 1 if find_metric(label)[0].better == "lower" else -1
        if ours is not None and theirs is not None and sign * ours < sign * theirs:
            return False
    return True


def _of_measuring(
    spec: Spec, answer: ParetoSet, problem: Problem, plans: Sequence[Plan], store: Path
) -> RunForecast | None:
    """Return what measuring these plans is expected to take; None where there are none."""
    if not plans:
        return None
    known = experience(Store(store), answer.hardware.fingerprint, spec, answer.model.digest)
    known = replace(known, known=frozenset(r.plan for r in answer.results))
    search = replace(spec.search, max_measured=len(plans) + 1)
    return foresee(replace(spec, search=search), problem.price(plans), known)
