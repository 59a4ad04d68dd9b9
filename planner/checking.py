"""`leanplan check`: are the budgets met today, by the locked plan, on this machine, and has anything regressed?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem, ExitCode
from knowledge_base.metrics import METRICS
from knowledge_base.types import Figure, Measurement, Plan
from planner.lock import NAME, Lock, read_lock
from planner.results import ParetoSet, PlanResult, Verdict

if TYPE_CHECKING:
    from planner.loop import Settings
    from planner.progress import Progress
    from planner.spec import Spec

RUN_TO_RUN = 0.10  # times and rates of one plan differ by about half as much between quiet runs minutes apart
REPEATABLE = ("memory", "quality")  # resources whose figures do not depend on how fast the machine is


@dataclass(frozen=True, slots=True, kw_only=True)
class Regression:
    """One metric against the lock. `outcome`: "same", "better", "worse" (beyond the slack), "not compared"."""

    metric: str
    locked: Figure
    now: Figure
    outcome: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The verdict of a check: budgets, regressions, notes, and the exit code they lead to."""

    name: str
    plan: Plan
    verdicts: tuple[Verdict, ...]
    regressions: tuple[Regression, ...]
    notes: tuple[str, ...]
    measured: bool
    answer: ParetoSet

    @property
    def exit_code(self) -> ExitCode:
        """1 when a budget is not met or a metric regressed, else 5 when something could not be judged, else 0."""
        errors = [v.outcome for v in self.verdicts if v.budget.level == "error"]
        if "not met" in errors or any(r.outcome == "worse" for r in self.regressions):
            return ExitCode.BUDGET_NOT_MET
        if set(errors) - {"met"}:
            return ExitCode.INCONCLUSIVE
        return ExitCode.DONE

    @property
    def headline(self) -> str:
        """The sentence that matters, first."""
        errors = [v for v in self.verdicts if v.budget.level == "error"]
        missed = [v for v in errors if v.outcome == "not met"]
        unsure = [v for v in errors if v.outcome not in ("met", "not met")]
        worse = [r for r in self.regressions if r.outcome == "worse"]
        kind = "" if self.measured else " (predicted)"
        if missed or worse:
            parts = [f"{len(missed)} of {len(errors)} budgets not met"] if missed else []
            parts += [f"{len(worse)} metrics worse than the lock"] if worse else []
            first = missed[0].sentence if missed else worse[0].sentence
            return f"{' and '.join(parts)}{kind}: {first}"
        if unsure:
            return f"{len(unsure)} of {len(errors)} budgets cannot be judged{kind}: {unsure[0].sentence}"
        return f"all {len(errors)} budgets met{kind}"


def check(
    spec: str | Path | Spec,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    lock: Path | None = None,
) -> CheckResult:
    """Measure the locked plan (the unchanged model where there is no lock) beside the unchanged model, and judge it.

    Raises:
        BadInput: spec, lock or model cannot be used; EnvironmentProblem: an error budget cannot be measured here.
    """
    from planner import loop
    from planner import spec as specs
    from planner.preparing import prepare
    from planner.progress import Progress

    spec = spec if isinstance(spec, specs.Spec) else specs.load(spec)
    settings = settings or loop.Settings(run_root=Path("runs"), store_root=Path(".leanplan"))
    progress = progress or Progress(quiet=True)
    path = lock or lock_path(spec)
    locked = read_lock(path) if path.exists() or lock else None
    prepared = prepare(
        spec, store=settings.store_root, predict=settings.predict, offline=settings.offline,
        trust_remote_code=settings.trust_remote_code, allow_pickle=settings.allow_pickle, tell=progress.line,
    )  # fmt: skip
    notes = list(prepared.notes)
    plan = loop.baseline_plan(loop.problem_of(prepared))
    if locked is None:
        notes.append(f"no {path.name}: the unchanged model is judged; leanplan plan --lock chooses a plan")
    else:
        plan = replace(locked.plan, model_digest=prepared.model.digest)
        if locked.plan.model_digest != prepared.model.digest:
            notes.append(
                "the model changed since the lock was written; the locked steps are applied to the model as it is now"
            )
        if plan.engine not in prepared.space.options:
            raise EnvironmentProblem(
                f"the locked plan needs the engine {plan.engine}, which cannot run here", hint="leanplan doctor"
            )
    if settings.predict:
        answer, result = _predicted(prepared, plan)
    else:
        run = loop.Run(replace(prepared, spec=_for_check(spec)), replace(settings, fresh=True), progress, _now())
        answer = run.go(only=(plan, locked.allocation if locked else None))
        result = next(r for r in answer.results if r.plan == plan)
        if failure := result.measurement.failure if result.measurement else None:
            raise EnvironmentProblem(
                f"the plan could not be measured: {failure.kind}: {failure.message}", hint=f"log in {answer.folder}"
            )
    regressions: list[Regression] = []
    if locked and result.measurement:
        same = locked.hardware_fingerprint == prepared.hardware.fingerprint
        if not same:
            notes.append(
                f"the lock was measured on another machine ({locked.hardware_name}): times are not compared, sizes and quality are"
            )
        regressions = compare(
            locked, result.measurement, slack=spec.check.regression_ratio, baseline=_baseline(answer), same_machine=same
        )
    return CheckResult(
        name=f"leanplan.{spec.goal}.{prepared.model.name}", plan=plan, verdicts=result.verdicts, regressions=tuple(regressions),
        notes=tuple(notes), measured=not settings.predict, answer=answer,
    )  # fmt: skip


def compare(
    lock: Lock, now: Measurement, *, slack: float, baseline: Mapping[str, Figure], same_machine: bool
) -> list[Regression]:
    """Return every metric of the lock against today's figure; worse only when the whole interval is beyond the slack.

    Two runs of one plan on one machine differ by more than the interval of either says. So figures of speed have
    at least RUN_TO_RUN of slack, and where the libraries are the same and the unchanged model's figure moved since
    the lock was written, that is the machine's doing: a plan is worse only if it is so against the lock's figure and
    against that figure moved as much.

    Args:
        baseline: the unchanged model's figures of today.
    """
    out = []
    for name, old in lock.figures.items():
        new = now.figures.get(name)
        if new is None or name == "build_s":
            continue
        metric = METRICS[name]
        repeatable = metric.resource in REPEATABLE
        # A ratio near zero has no meaningful relative change: its slack is in points.
        relative = metric.dimension != "ratio"
        allowed = slack if repeatable else max(slack, RUN_TO_RUN)
        drift = 1.0
        if not repeatable and lock.versions == now.versions and name in lock.baseline and name in baseline:
            drift = baseline[name].value / lock.baseline[name].value
        sign = 1 if metric.better == "lower" else -1
        gaps = []
        for reference in (1.0, drift):
            step = allowed * (abs(old.value * reference) if relative else 1.0)
            low, high = sorted((sign * (new.low - old.high * reference), sign * (new.high - old.low * reference)))
            gaps.append((low - step, high + step))
        outcome = "worse" if all(g[0] > 0 for g in gaps) else "better" if all(g[1] < 0 for g in gaps) else "same"
        if not same_machine and not repeatable:
            outcome = "not compared"
        change = f"{new.value / old.value - 1:+.1%}" if old.value else "from 0"
        if gaps[0][0] > 0 and outcome == "same":
            change += f", the unchanged model {drift - 1:+.1%}: the machine, not the plan"
        was, is_now = (units.format(figure.value, metric.dimension) for figure in (old, new))
        sentence = f"{metric.label} {is_now}, locked {was} ({change})"
        out.append(Regression(metric=name, locked=old, now=new, outcome=outcome, sentence=sentence))
    return out


def lock_path(spec: Spec) -> Path:
    """Return where the spec's lock file lies: `check.against`, beside the spec."""
    return Path(spec.folder) / (spec.check.against or NAME)


def lock_of(answer: ParetoSet, result: PlanResult | None = None) -> Lock:
    """Return the lock of a measured plan: the recommended one unless another is given.

    Raises:
        BadInput: there is no such plan, or it was not measured.
    """
    result = result or answer.recommended
    if result is None or result.measurement is None or result.measurement.artefact_digest is None:
        raise BadInput("only a measured plan can be locked", hint="leanplan plan SPEC --lock")
    return Lock(
        plan=result.plan, artefact_digest=result.measurement.artefact_digest, hardware_name=answer.hardware.name,
        hardware_fingerprint=answer.hardware.fingerprint, workload=answer.workload, figures=result.measurement.figures,
        baseline=_baseline(answer), allocation=result.allocation, versions=result.measurement.versions,
    )  # fmt: skip


def _baseline(answer: ParetoSet) -> Mapping[str, Figure]:
    first = answer.baseline
    return first.measurement.figures if first and first.measurement else {}


def _for_check(spec: Spec) -> Spec:
    """Return the spec with as many measurements as a check needs: the unchanged model and one plan."""
    return replace(spec, search=replace(spec.search, max_measured=2))


def _predicted(prepared, plan: Plan) -> tuple[ParetoSet, PlanResult]:  # type: ignore[no-untyped-def]
    import cost_models
    from planner import loop
    from planner.judging import judge

    answer = loop.predicted(prepared)
    problem = loop.problem_of(prepared)
    reference = problem.price([loop.baseline_plan(problem)]).problem_baseline()
    estimate = cost_models.estimate(plan, problem.model, problem.workload, problem.hardware)
    return answer, PlanResult(
        plan=plan, estimate=estimate, verdicts=judge(prepared.spec.budgets, baseline=reference, estimate=estimate)
    )


def _now() -> float:
    import time

    return time.monotonic()
