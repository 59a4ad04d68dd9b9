"""Answers of any size made from facts alone, for tests of what is shown: nothing is run, the same seed gives the same."""

from __future__ import annotations

import random
from dataclasses import replace

from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from knowledge_base.types import Budget, Estimate, Failure, Figure, Measurement, Plan, Step, Value
from planner import answering
from planner.judging import judge
from planner.results import ParetoSet, PlanResult, Rejection
from planner.run_forecast import Amount, RunForecast

OBJECTIVES = ("tpot_p50", "peak_memory", "quality_loss")
BUDGETS = (
    Budget(metric="ttft_s", statistic="p50", bound="max", value=0.06, text="60 ms"),
    Budget(metric="peak_memory_bytes", statistic="mean", bound="max", value=700 * 2**20, text="700 MiB"),
    Budget(metric="quality_loss_ratio", statistic="mean", bound="max", value=0.05, text="5 %"),
    Budget(metric="throughput_tokens_per_s", statistic="p50", bound="min", value=60.0, text="60 tokens/s"),
    Budget(metric="tpot_s", statistic="p50", bound="max", value=0.9, text="0.9x baseline", relative=True, level="warn"),
)
GGUF = ("q3_k", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0")
HOSTILE = "x[/bold]|`</script><img src=http://127.0.0.1:9/x onerror=alert(1)>@everyone\x1b[2J::error::\u2028"


def figure(value: float, spread: float = 0.03, **more: object) -> Figure:
    return Figure(value=value, low=value * (1 - spread), high=value * (1 + spread), n=40, statistic="p50", **more)  # type: ignore[arg-type]


def exact(value: float) -> Figure:
    return Figure(value=value, low=value, high=value, n=1, confidence=1.0)


def plan_of(number: int, draw: random.Random) -> Plan:
    """Return the plan of a number: 0 is the unchanged model, the others are all different."""
    if number == 0:
        return Plan(model_digest="toy", engine="transformers")
    steps = [Step("prune_width", {"keep": round(0.5 + 0.002 * number, 3)})]
    if draw.random() < 0.4:
        steps.append(Step("recover_lora", {"steps": draw.choice((20, 60))}))
    if draw.random() < 0.6:
        return Plan(
            model_digest="toy", engine="llama_cpp", steps=(*steps, Step("weight_gguf", {"type": draw.choice(GGUF)}))
        )
    return Plan(model_digest="toy", engine="transformers", steps=(*steps, Step("weight_int8")))


def result_of(number: int, draw: random.Random) -> PlanResult:
    """Return one plan with figures that hang together: smaller is faster and worse."""
    plan = plan_of(number, draw)
    size = 1.0 if number == 0 else draw.uniform(0.12, 0.8)
    tpot, loss = (
        0.02 * size * draw.uniform(0.8, 1.3),
        0.0 if number == 0 else 0.3 * (1 - size) ** 4 * draw.uniform(0.3, 3),
    )
    engine = (300 if plan.engine == "transformers" else 45) * 2**20
    weights, cache = 300 * 2**20 * size, 24 * 2**20
    figures = {
        "ttft_s": figure(4 * tpot), "tpot_s": figure(tpot), "throughput_tokens_per_s": figure(1 / tpot),
        "peak_memory_bytes": exact(engine + weights + cache + 40 * 2**20), "weights_bytes": exact(weights),
        "kv_cache_bytes": exact(cache), "artefact_bytes": exact(weights * 1.01), "quality_loss_ratio": figure(loss, 0.2),
        "agreement_ratio": figure(1 - loss), "kl_divergence_nats": figure(loss / 10), "perplexity": figure(20 * (1 + loss)),
        "energy_j_per_token": figure(tpot * 9, 0.7, source="modelled", note="9 W assumed"),
        "build_s": exact(2 + 30 * draw.random()),
    }  # fmt: skip
    off = {name: draw.lognormvariate(0, 0.25) for name in figures}
    estimate = Estimate(
        plan_id=plan.id, hardware_name="toy machine",
        values={
            name: Value(mid=f.value * off[name], low=f.value * off[name] * 0.75, high=f.value * off[name] * 1.33, source="analytic", because="made up")
            for name, f in figures.items()
            if name not in ("agreement_ratio", "kl_divergence_nats", "perplexity")
        },
    )  # fmt: skip
    began, wall_s = 1795266301 + 42 * number, 40.0
    protocol = {
        "wall_s": wall_s, "load_s": 0.6, "timed_s": 12.0, "framework_bytes": engine, "step_s": {"load": 0.2},
        "interleaved_blocks": 9 if number in (0, 1) else 0, "seed": 0,
    }  # fmt: skip
    failed = number % 17 == 5
    failure = (
        Failure(kind="timeout", stage="build", message="stopped at its time limit while at recover_lora")
        if failed
        else None
    )
    measurement = Measurement(
        plan=plan, key=f"{number:064x}", hardware_fingerprint="toy", figures={} if failed else figures, failure=failure,
        artefact_digest=None if failed else f"{number + 7:064x}", protocol=protocol, taken_at=stamp(began + wall_s),
        warnings=("timings vary by 12% of their mean (above 10 %): close other programs",) if number % 3 == 0 else (),
        versions={"torch": "2.13.0"}, sequence=number,
    )  # fmt: skip
    ratios = {name: exact(1.0) for name in figures} if number == 0 else {}
    if number == 1:
        ratios = {"tpot_s": Figure(value=0.2, low=0.18, high=0.22, n=9, statistic="ratio")}
    return PlanResult(plan=plan, estimate=estimate, measurement=measurement, ratios=ratios, finalist=number == 1)


def stamp(second: float) -> str:
    import time

    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))


def answer(count: int = 12, *, seed: int = 0, name: str = "toy", measured: bool = True) -> ParetoSet:
    """Return an answer of `count` plans; without `measured`, the same plans as they were predicted."""
    draw = random.Random(seed)
    results = [result_of(number, draw) for number in range(count)]
    if not measured:
        results = [replace(r, measurement=None, ratios={}, finalist=False) for r in results]
    first = results[0]
    reference = (
        {n: f.value for n, f in first.measurement.figures.items()}
        if first.measurement
        else {n: v.mid for n, v in first.estimate.values.items()}  # type: ignore[union-attr]
    )
    results = [
        r if r.measurement and r.measurement.failure else replace(
            r, verdicts=judge(BUDGETS, baseline=reference, measurement=r.measurement, estimate=r.estimate, ratios=r.ratios)
        )
        for r in results
    ]  # fmt: skip
    results = answering.mark_front(results, OBJECTIVES)
    best = answering.recommend(results, OBJECTIVES)
    results = [replace(r, why=reasons_of(r, results)) for r in results]
    return ParetoSet(
        run_id="2026-11-21T1305Z-serve-toy-0000", model=replace(TOY_MODEL, name=name), hardware=TOY_MACHINE, workload=TOY_WORKLOAD,
        budgets=BUDGETS, objectives=OBJECTIVES, results=tuple(results), recommended_id=best.plan.id if best else None,
        measured=measured, conflicts=() if best else answering.nearest(results, BUDGETS),
        rejected=answering.rejections(results, (Rejection(what="batch_size", why="nothing to batch", kind="rule"),), {"peak_memory": 12}),
        sentence=answering.sentence(best, results, OBJECTIVES, measured=measured),
        prediction_errors={"tpot_s": {"n": float(count), "median_abs_ratio": 0.12, "worst_abs_ratio": 0.4, "coverage": 0.67}} if measured else {},
        search={
            "solver": "auto", "seed": seed, "effort": "quick", "legal_at_most": 667440, "priced": 948, "measured": count,
            "why_tried": {r.plan.id: "on the predicted front" for r in results}, "seconds": {"validate": 42.0 * count, "finals": 20.0},
            "wall_s": 42.0 * count + 25,
        },
        forecast=forecast() if measured else None,
        provenance={"versions": {"leanplan": "0.1.0", "torch": "2.13.0"}, "data": "0123456789abcdef", "spec": {"name": "toy", "goal": "serve"}},
    )  # fmt: skip


def forecast() -> RunForecast:
    """Return what a run was expected to take beside what it took: more memory than told, no GPU."""
    expected = {
        "candidates": (8.0, 11.0, 12.0, 12.0), "wall_s": (240.0, 480.0, 900.0, 529.0),
        "peak_memory_bytes": (0.6e9, 0.8e9, 1.1e9, 1.2e9), "peak_device_bytes": (0.0, 0.0, 0.0, 0.0),
        "disk_bytes": (1e9, 1.5e9, 2e9, 1.8e9), "download_bytes": (0.0, 0.0, 0.0, 0.0),
    }  # fmt: skip
    return RunForecast(
        amounts={
            name: Amount(low=low, mid=mid, high=high, prior=mid, because="made up", fact=fact)
            for name, (low, mid, high, fact) in expected.items()
        },
        stages_s={"build": Amount(low=60.0, mid=120.0, high=240.0, prior=120.0, because="made up", fact=150.0)},
    )


def reasons_of(result: PlanResult, results: list[PlanResult]) -> tuple[str, ...]:
    steps = tuple(f"{s}: tpot -12%, quality_loss +0.3% points (predicted)" for s in result.plan.steps)
    return (*steps, *answering.reasons(result, results, {}, OBJECTIVES))


def hostile(count: int = 12, text: str = HOSTILE) -> ParetoSet:
    """Return an answer in which every text that may come from a stranger is `text` (row 72 of the table of faults)."""
    fair = answer(count)

    def spoilt(result: PlanResult) -> PlanResult:
        measurement = result.measurement
        assert measurement is not None
        failure = measurement.failure and replace(measurement.failure, message=text)
        plan = (
            replace(result.plan, steps=(*result.plan.steps, Step(text, {text: text})))
            if result.plan.steps
            else result.plan
        )
        figures = {n: replace(f, note=text) for n, f in measurement.figures.items()}
        measurement = replace(measurement, plan=plan, failure=failure, figures=figures, warnings=(text,))
        return replace(result, plan=plan, measurement=measurement, why=(text, *result.why))

    results = tuple(spoilt(r) for r in fair.results)
    best = next(r.plan.id for r, old in zip(results, fair.results) if old.plan.id == fair.recommended_id)
    return replace(
        fair, run_id=text, results=results, recommended_id=best, sentence=text, conflicts=(text,),
        model=replace(fair.model, name=text, source=text), hardware=replace(fair.hardware, name=text),
        rejected=(Rejection(what=text, why=text, kind=text, count=2),),
        provenance={"versions": {text: text}, "data": text, "spec": {text: text}},
    )  # fmt: skip
