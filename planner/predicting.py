"""What is predicted of a prepared spec: its search problem, the predicted answer, and what a result depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from knowledge_base.serde import digest, plain
from knowledge_base.types import Estimate, Hardware, Measurement, Model, Plan, Workload
from planner import answering
from planner.judging import judge
from planner.results import ParetoSet, PlanResult

if TYPE_CHECKING:
    from planner.preparing import Prepared
    from planner.spec import Spec
    from planner.store import Record
    from search.problem import Priced, Problem

OTHERS = 40  # measurements of other runs that calibration learns from: fitting takes time
SHOWN_PREDICTED = 40  # results a predicted-only answer lists


def predicted(prepared: Prepared) -> ParetoSet:
    """Return the predicted Pareto set: nothing is run, and no time of day or duration is in it (promise P6)."""
    spec = prepared.spec
    problem = problem_of(prepared)
    priced = search_plans(problem, spec)
    results = _best_predicted(priced, spec)
    best = answering.recommend(results, spec.objectives)
    price = prices(problem, [best.plan] if best else [])
    results = [
        replace(r, why=answering.reasons(r, results, price, spec.objectives) if r is best else ()) for r in results
    ]
    return ParetoSet(
        run_id=f"predicted-{digest([plain(spec_facts(spec)), prepared.model.digest])[:8]}",
        model=prepared.model, hardware=prepared.hardware, workload=spec.workload, budgets=spec.budgets,
        objectives=spec.objectives, results=tuple(results), recommended_id=best.plan.id if best else None, measured=False,
        rejected=answering.rejections(results, prepared.refused, infeasible(priced)),
        sentence=answering.sentence(best, results, spec.objectives, measured=False),
        conflicts=() if best else answering.nearest(results, spec.budgets),
        search={"solver": spec.search.solver, "seed": spec.search.seed, "legal_at_most": prepared.space.count(), "priced": len(priced.plans)},
        provenance={"versions": versions()},
    )  # fmt: skip


def problem_of(prepared: Prepared, *, baseline: Mapping[str, float] | None = None, calibration: Any = None) -> Problem:
    """Return the search problem of a prepared spec, with what has been learned so far."""
    from search.problem import Problem

    return Problem(
        model=prepared.model, workload=prepared.spec.workload, hardware=prepared.hardware, space=prepared.space,
        budgets=prepared.spec.budgets, objectives=prepared.spec.objectives, baseline=baseline or {}, calibration=calibration,
    )  # fmt: skip


def learned(
    records: Iterable[Record],
    model: Model,
    workload: Workload,
    hardware: Hardware,
    measured: Sequence[Measurement] = (),
) -> Any:
    """Return corrections of the predictions by what was measured on a machine; None where nothing was.

    Args:
        records: of the store, of any model; `measured`: those of this model and workload.
    """
    from cost_models import calibrate

    mine = {m.key for m in measured}
    others = [
        ([r.measurement], r.model, r.workload)
        for r in records
        if r.measurement.failure is None and r.measurement.key not in mine
    ][-OTHERS:]
    return calibrate.fit(measured, model, workload, hardware, others=others) if measured or others else None


def search_plans(problem: Problem, spec: Spec, *, already_drawn: int = 0) -> Priced:
    """Return priced plans. The seed moves on with what was measured, so that a resumed search does not repeat itself."""
    import search

    return search.solve(
        problem, solver=spec.search.solver, effort=spec.search.effort, seed=spec.search.seed + already_drawn
    )


def spec_facts(spec: Spec) -> dict[str, Any]:
    """Return what of a spec decides its results: all but where it and its texts lie, and how long one may search."""
    facts = plain(spec)
    for name in ("folder", "check", "quality"):
        facts.pop(name, None)
    facts["budgets"] = [{k: v for k, v in b.items() if k not in ("text", "line")} for b in facts["budgets"]]
    if facts["calibration"]:
        facts["calibration"].pop("data")
    facts["search"] = {k: v for k, v in facts["search"].items() if k not in ("time_limit_s", "max_measured")}
    return facts


def versions() -> dict[str, str]:
    """Return the versions of the packages figures depend on, without importing them."""
    from importlib import metadata

    found = {}
    for name in (
        "leanplan", "torch", "transformers", "torchao", "peft", "xllamacpp", "gguf", "openvino", "nncf", "onnxruntime",
        "onnxruntime-genai", "onnx", "optuna", "pulp", "numpy",
    ):  # fmt: skip
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _best_predicted(priced: Priced, spec: Spec) -> list[PlanResult]:
    """Return the unchanged model, the predicted front, and the plans next to the budgets, as results."""
    import cost_models
    from search.pareto import front

    problem = priced.problem
    fine = [i for i, v in enumerate(priced.violations()) if v <= 0]
    pool = fine or sorted(range(len(priced.plans)), key=lambda i: priced.violations()[i])[:200]
    costs = priced.costs()
    chosen = [pool[k] for k in front(costs[pool])]
    chosen = sorted(chosen, key=lambda i: tuple(costs[i]))[:SHOWN_PREDICTED]
    unchanged = problem.space.unchanged()
    plans = list(dict.fromkeys([unchanged, *(priced.plans[i] for i in chosen)]))
    reference = priced.problem_baseline()
    results = []
    for plan in plans:
        estimate = cost_models.estimate(plan, problem.model, problem.workload, problem.hardware, problem.calibration)
        verdicts = judge(spec.budgets, baseline=reference, estimate=estimate)
        results.append(PlanResult(plan=plan, estimate=estimate, verdicts=verdicts))
    # A budget only measuring can tell must not keep a predicted plan from being recommended.
    results = [replace(r, verdicts=tuple(v for v in r.verdicts if v.outcome != "not judged")) for r in results]
    return answering.mark_front(results, problem.objective_metrics)


def prices(problem: Problem, plans: list[Plan]) -> dict[Plan, Estimate]:
    prices: dict[Plan, Estimate] = {}
    for plan in plans:
        prices |= answering.price_with_and_without(
            plan,
            model=problem.model,
            workload=problem.workload,
            hardware=problem.hardware,
            calibration=problem.calibration,
        )
    return prices


def infeasible(priced: Priced) -> dict[str, int]:
    """Return budget label -> how many priced plans are predicted to be beyond it."""
    return {
        b.label: int((column > 0).sum())
        for b in priced.problem.budgets
        if b.level == "error" and (column := priced.violation(b)) is not None
    }
