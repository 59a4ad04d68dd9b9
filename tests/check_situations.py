"""Checks in every situation a pull request can be in: made-up measurements, judged and compared by the real code."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from knowledge_base.types import Budget, Estimate, Figure, Measurement, Plan, Step, Value
from planner.checking import CheckResult, changes, compare
from planner.judging import judge
from planner.lock import Lock, write_lock
from planner.results import ParetoSet, PlanResult

ROOT = Path(__file__).resolve().parent.parent
OBJECTIVES = ("tpot_p50", "peak_memory", "quality_loss")
BUDGETS = (
    Budget(metric="ttft_s", statistic="p50", bound="max", value=0.05, text="50 ms", line=8),
    Budget(metric="peak_memory_bytes", statistic="mean", bound="max", value=2**31, text="2 GiB", line=9),
    Budget(metric="tpot_s", statistic="p50", bound="max", value=1.0, relative=True, text="1.0x baseline", line=10),
    Budget(metric="quality_loss_ratio", statistic="mean", bound="max", value=0.05, level="warn", text="5 %", line=11),
)
SMALL = Plan(model_digest="toy", engine="llama_cpp", steps=(Step("weight_gguf", {"type": "q4_k"}),))
LARGE = Plan(model_digest="toy", engine="llama_cpp", steps=(Step("weight_gguf", {"type": "q8_0"}),))
UNCHANGED = Plan(model_digest="toy", engine="transformers")
PROTOCOL = {"interleaved_blocks": 9, "seed": 0, "data": "a2a7dbadccb0b2de"}
NOISE = ("timings vary by 27% of their mean (above 10 %): close other programs",)
HOSTILE = "x[/bold]|`</script><img onerror=alert(1)>@everyone\x1b[2J\n::error::#123 https://evil.example [a](b)"


def figure(value: float, spread: float = 0.02) -> Figure:
    return Figure(value=value, low=value * (1 - spread), high=value * (1 + spread), n=45, statistic="p50")


def exact(value: float) -> Figure:
    return Figure(value=value, low=value, high=value, n=1, confidence=1.0)


def figures(ttft_s: float = 0.03, peak: float = 1.6e9, tpot_s: float = 0.004, loss: float = 0.01) -> dict[str, Figure]:
    return {
        "ttft_s": figure(ttft_s), "tpot_s": figure(tpot_s), "peak_memory_bytes": exact(peak),
        "quality_loss_ratio": Figure(value=loss, low=loss - 0.002, high=loss + 0.002, n=24),
    }  # fmt: skip


def lock(plan: Plan = SMALL, some: Mapping[str, Figure] | None = None, machine: str = "toy") -> Lock:
    return Lock(
        plan=plan, artefact_digest="a" * 64, hardware_name="toy machine", hardware_fingerprint=machine,
        workload=TOY_WORKLOAD, figures=some or figures(), baseline=figures(0.08, 4e9, 0.02, 0.0),
        versions={"xllamacpp": "1.0"},
    )  # fmt: skip


def measured(
    plan: Plan, some: Mapping[str, Figure], budgets: Sequence[Budget], reference_s: float = 0.02
) -> PlanResult:
    measurement = Measurement(
        plan=plan, key="k", hardware_fingerprint="toy", figures=some, protocol=PROTOCOL, versions={"xllamacpp": "1.0"},
    )  # fmt: skip
    ratio = {"tpot_s": exact(1.0) if plan == UNCHANGED else figure(some["tpot_s"].value / reference_s)}
    verdicts = judge(budgets, baseline={"tpot_s": reference_s}, measurement=measurement, ratios=ratio)
    return PlanResult(plan=plan, measurement=measurement, verdicts=verdicts, ratios=ratio, on_front=True)


def predicted(plan: Plan, peak: float, budgets: Sequence[Budget] = BUDGETS) -> PlanResult:
    middle = {"ttft_s": 0.03, "peak_memory_bytes": peak, "tpot_s": 0.005, "quality_loss_ratio": 0.02}
    values = {k: Value(mid=v, low=v * 0.8, high=v * 1.2, source="analytic") for k, v in middle.items()}
    estimate = Estimate(plan_id=plan.id, hardware_name="toy machine", values=values)
    verdicts = judge(budgets, baseline={"tpot_s": 0.02}, estimate=estimate)
    return PlanResult(plan=plan, estimate=estimate, verdicts=verdicts, on_front=True)


def answer(*results: PlanResult, measured: bool = True, conflicts: tuple[str, ...] = ()) -> ParetoSet:
    feasible = [r for r in results if r.feasible]
    return ParetoSet(
        run_id="run", model=TOY_MODEL, hardware=TOY_MACHINE, workload=TOY_WORKLOAD, budgets=BUDGETS, objectives=OBJECTIVES,
        results=results, recommended_id=feasible[-1].plan.id if feasible else None, measured=measured, conflicts=conflicts,
    )  # fmt: skip


def check(
    now: Mapping[str, Figure],
    *,
    plan: Plan = SMALL,
    lock: Lock | None = None,
    main: Lock | None = None,
    possible: ParetoSet | None = None,
    notes: tuple[str, ...] = (),
    budgets: Sequence[Budget] = BUDGETS,
    name: str = "serve-toy",
    slower: float = 1.0,
    warnings: tuple[str, ...] = (),
) -> CheckResult:
    """Return the check of a plan with these figures of today, beside the unchanged model (`slower` than the lock's)."""
    reference = figures(0.08 * slower, 4e9, 0.02 * slower, 0.0)
    result = measured(plan, now, budgets, 0.02 * slower)
    assert result.measurement
    result = replace(result, measurement=replace(result.measurement, warnings=warnings))
    whole = answer(*([measured(UNCHANGED, reference, budgets)] if plan != UNCHANGED else []), result)
    main = main or lock
    regressions = []
    if lock:
        same = lock.hardware_fingerprint == "toy"
        regressions = compare(lock, result.measurement, slack=0.03, baseline=reference, same_machine=same)
    return CheckResult(
        name=name, result=result, regressions=tuple(regressions), notes=notes, measured=True, answer=whole, lock=lock,
        main=main, changes=changes(main, whole, result) if main else (), predicted=possible, spec_file="leanplan.yaml",
    )  # fmt: skip


def hostile(text: str = HOSTILE) -> CheckResult:
    """A check in which every text that can be foreign is `text`; the model changed as well."""
    budgets = [replace(b, text=text) for b in BUDGETS]
    plan = Plan(model_digest="toy", engine=text, steps=(Step(text, {text: text}),))
    result = check(figures(peak=2.4e9), plan=plan, lock=lock(), notes=(text,), budgets=budgets, name=text)
    whole = replace(
        result.answer, model=replace(TOY_MODEL, name=text), hardware=replace(TOY_MACHINE, name=text), conflicts=(text,)
    )  # fmt: skip
    verdicts = tuple(replace(v, sentence=f"{text}: {v.sentence}") for v in result.verdicts)
    return replace(result, answer=whole, result=replace(result.result, verdicts=verdicts), spec_file="a b,c:%d\n.yaml")


def only_predicted() -> CheckResult:
    """`check --predict`: the locked plan is predicted to need too much memory."""
    whole = answer(predicted(UNCHANGED, 4e9), predicted(SMALL, 1.6e9), measured=False)
    return CheckResult(
        name="serve-toy", result=predicted(LARGE, 2.6e9), regressions=(), notes=(), measured=False, answer=whole,
        lock=lock(LARGE), main=lock(LARGE), spec_file="leanplan.yaml",
    )  # fmt: skip


def situations() -> dict[str, CheckResult]:
    """Return every situation in which a check comes to a verdict, by name."""
    smaller = answer(predicted(UNCHANGED, 4e9), predicted(SMALL, 1.6e9), measured=False)
    nothing = answer(
        predicted(UNCHANGED, 4e9), predicted(SMALL, 2.5e9), measured=False,
        conflicts=("peak_memory: the best found is 2.33 GiB", "nearest to all budgets: llama_cpp, short by 16%"),
    )  # fmt: skip
    grown = figures(ttft_s=0.041, peak=2.53e9)
    return {
        "met": check(figures(ttft_s=0.0305), lock=lock()),
        "not_met": check(grown, plan=LARGE, lock=lock(LARGE, grown), main=lock(), possible=smaller),
        "worse": check(figures(ttft_s=0.045), lock=lock()),
        "inconclusive": check(figures(ttft_s=0.0499), lock=lock(some=figures(ttft_s=0.048)), warnings=NOISE),
        "slower_machine": check(figures(ttft_s=0.045, tpot_s=0.006), lock=lock(), slower=1.5),
        "infeasible": check(figures(peak=2.6e9), lock=lock(), possible=nothing),
        "other_machine": check(figures(ttft_s=0.045), lock=lock(machine="another"), notes=("the lock was measured on another machine",)),
        "first_run": check(figures(), plan=UNCHANGED, notes=("no leanplan.lock: the unchanged model is judged",)),
        "predicted": only_predicted(),
        "hostile": hostile(),
    }  # fmt: skip


SPEC = """\
version: 1
model: {source: shape}
hardware: h100-sxm
workload: {prompt_tokens: 1024, output_tokens: 256}
engines: [transformers]
budgets:
  peak_memory: {max: 400 GiB}
  quality_loss: {max: 10 %}
objectives: [tpot_p50, quality_loss]
search: {effort: quick, seed: 0}
"""


def make_place(folder: Path, lock: Lock | None = None, spec: str = SPEC) -> None:
    """Write a spec that is predicted only (a model's shape, a machine of the catalogue), and its lock."""
    (folder / "shape").mkdir()
    shutil.copy(ROOT / "examples/llama-70b-shape/config.json", folder / "shape")
    (folder / "leanplan.yaml").write_text(spec, encoding="utf-8")
    if lock:
        write_lock(folder / "leanplan.lock", lock)
