"""What one may want instead of the recommended plan: the smallest, the fastest, the one closest to the original."""

from __future__ import annotations

from collections.abc import Sequence

from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from knowledge_base.types import Budget, Estimate, Failure, Figure, Measurement, Plan, Step, Value
from planner import answering
from planner.judging import judge
from planner.results import ParetoSet, PlanResult

OBJECTIVES = ("tpot_p50", "peak_memory", "quality_loss")
LIMIT = Budget(metric="peak_memory_bytes", statistic="mean", bound="max", value=500.0, text="500 B")


def result(name: str | None, *, latency: float, size: float, kl: float | None, peak: float = 100.0) -> PlanResult:
    values = {
        "latency_s": latency,
        "tpot_s": latency,
        "artefact_bytes": size,
        "peak_memory_bytes": peak,
        "quality_loss_ratio": kl or 0.0,
    }
    values |= {} if kl is None else {"kl_divergence_nats": kl}
    plan = Plan(model_digest="toy", engine="transformers", steps=(Step(name),) if name else ())
    figures = {metric: Figure(value=v, low=v, high=v, n=9) for metric, v in values.items()}
    found = Measurement(plan=plan, key=str(name), hardware_fingerprint="toy", figures=figures)
    return PlanResult(plan=plan, measurement=found, verdicts=judge([LIMIT], baseline={}, measurement=found))


def broken(name: str) -> PlanResult:
    plan = Plan(model_digest="toy", engine="transformers", steps=(Step(name),))
    failure = Failure(kind="timeout", stage="build", message="x")
    return PlanResult(
        plan=plan, measurement=Measurement(plan=plan, key=name, hardware_fingerprint="toy", failure=failure)
    )


def answer(results: Sequence[PlanResult], *, measured: bool = True) -> ParetoSet:
    return ParetoSet(
        run_id="r", model=TOY_MODEL, hardware=TOY_MACHINE, workload=TOY_WORKLOAD, budgets=(LIMIT,), objectives=OBJECTIVES,
        results=tuple(answering.mark_front(results, OBJECTIVES)), recommended_id=None, measured=measured,
    )  # fmt: skip


UNCHANGED = result(None, latency=1.0, size=100, kl=0.0)
QUICK = result("quick", latency=0.2, size=90, kl=0.3)
SMALL = result("small", latency=0.9, size=10, kl=0.4)
NEAR = result("near", latency=0.8, size=80, kl=0.001)
BEYOND = result("beyond", latency=0.01, size=1, kl=0.0001, peak=900)


def names(found: dict[str, PlanResult]) -> dict[str, str]:
    return {name: r.plan.steps[0].technique for name, r in found.items()}


def test_each_is_best_at_what_it_is_called_and_keeps_the_budgets() -> None:
    found = answering.alternatives(answer([UNCHANGED, QUICK, SMALL, NEAR, BEYOND, broken("slow")]))
    assert names(found) == {"smallest": "small", "fastest": "quick", "closest to the original": "near"}


def test_where_nothing_keeps_the_budgets_the_rest_is_looked_at() -> None:
    assert set(names(answering.alternatives(answer([UNCHANGED, BEYOND]))).values()) == {"beyond"}


def test_the_unchanged_model_is_no_alternative_to_itself() -> None:
    assert answering.alternatives(answer([UNCHANGED, broken("slow")])) == {}
    assert answering.alternatives(answer([])) == {}


def test_a_figure_that_some_plan_lacks_is_not_compared() -> None:
    blind = result("blind", latency=0.5, size=50, kl=None)
    found = answering.alternatives(answer([UNCHANGED, blind, NEAR]))
    assert names(found)["closest to the original"] == "blind"  # by quality loss, which both have


def test_predicted_plans_have_alternatives_too() -> None:
    def predicted(r: PlanResult) -> PlanResult:
        assert r.measurement
        values = {
            k: Value(mid=f.value, low=f.low, high=f.high, source="analytic")
            for k, f in r.measurement.figures.items()
            if k != "kl_divergence_nats"
        }
        return PlanResult(plan=r.plan, estimate=Estimate(plan_id=r.plan.id, hardware_name="toy", values=values))

    found = answering.alternatives(answer([predicted(r) for r in (UNCHANGED, QUICK, SMALL, NEAR)], measured=False))
    assert names(found) == {"smallest": "small", "fastest": "quick", "closest to the original": "near"}
