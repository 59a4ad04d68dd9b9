"""`leanplan check`: are the budgets met today, by the locked plan, on this machine, and has anything regressed?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem, ExitCode
from knowledge_base.metrics import METRICS
from knowledge_base.serde import plain
from knowledge_base.types import Figure, Measurement, Plan
from planner.judging import crowding, timed
from planner.lock import NAME, Lock, read_lock
from planner.results import ParetoSet, PlanResult, Verdict

if TYPE_CHECKING:
    from planner.loop import Settings
    from planner.progress import Progress
    from planner.spec import Spec

MAPPED_BYTES = (
    16 * 2**20
)  # of a process's peak: pages of libraries' files, which the system maps as it pleases (12 MiB seen)
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
    drift: float = 1.0  # the unchanged model's figure of today over its figure when the lock was written


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The verdict of a check: budgets, regressions, notes, and the exit code they lead to.

    `lock` is what regressions are judged by; `main` is what a reader compares with, the lock of the main branch where
    that was given. `predicted` is asked for when an error budget is not met: what could be done.
    """

    name: str  # tells the checks of one repository apart
    result: PlanResult  # the plan that was judged
    regressions: tuple[Regression, ...]
    notes: tuple[str, ...]
    measured: bool
    answer: ParetoSet
    lock: Lock | None = None
    main: Lock | None = None
    changes: tuple[str, ...] = ()  # what is not as `main` says: plan, model, workload, libraries, machine
    predicted: ParetoSet | None = None
    spec_file: str = ""  # from the root of the repository, for annotations

    @property
    def plan(self) -> Plan:
        """The plan that was judged."""
        return self.result.plan

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for each budget that is not off."""
        return self.result.verdicts

    @property
    def fix(self) -> PlanResult | None:
        """A plan that would meet every error budget: a measured one, else a predicted one, else None."""
        for answer in filter(None, (self.answer, self.predicted)):
            others = [r for r in answer.results if r.plan != self.plan and r.verdicts and r.feasible]
            if others:
                return min(others, key=lambda r: r.plan.id != answer.recommended_id)
        return None

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
            parts += [f"{len(worse)} metric{'s' if len(worse) > 1 else ''} worse than the lock"] if worse else []
            first = missed[0].sentence if missed else worse[0].sentence
            return f"{' and '.join(parts)}{kind}: {first}"
        if unsure:
            return f"{len(unsure)} of {len(errors)} budgets cannot be judged{kind}: {unsure[0].sentence}"
        return f"all {len(errors)} budgets met{kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A check that ended before it could judge anything, in the words of the error."""

    name: str
    message: str
    hint: str
    where: str | None
    exit_code: ExitCode
    spec_file: str = ""

    @property
    def headline(self) -> str:
        """The sentence that matters, first."""
        return f"nothing was judged: {f'{self.where}: ' if self.where else ''}{self.message}"


def check(
    spec: str | Path | Spec,
    *,
    settings: Settings | None = None,
    progress: Progress | None = None,
    baseline: Path | None = None,
) -> CheckResult:
    """Measure the locked plan (the unchanged model where there is no lock) beside the unchanged model, and judge it.

    Args:
        baseline: the lock file of the main branch: what to show beside today's figures, and the plan and the figures
            to judge by where the spec has no lock of its own.

    Raises:
        BadInput: spec, lock or model cannot be used; EnvironmentProblem: an error budget cannot be measured here.
    """
    from planner import loop, predicting
    from planner import spec as specs
    from planner.preparing import prepare
    from planner.progress import Progress

    spec = spec if isinstance(spec, specs.Spec) else specs.load(spec)
    settings = settings or loop.Settings(run_root=Path("runs"), store_root=Path(".leanplan"))
    progress = progress or Progress(quiet=True)
    path = lock_path(spec)
    own = read_lock(path) if path.exists() else None
    main, notes = _main_lock(baseline, own)
    locked = own or main
    prepared = prepare(
        spec, store=settings.store_root, predict=settings.predict, offline=settings.offline,
        trust_remote_code=settings.trust_remote_code, allow_pickle=settings.allow_pickle, tell=progress.line,
    )  # fmt: skip
    notes += prepared.notes
    plan = prepared.space.unchanged()
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
    measured = prepared.local and not settings.predict
    if not measured:
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
        # Arithmetic differs between processors and libraries, so equal digests are owed only where nothing changed.
        if not changes(locked, answer, result) and locked.artefact_digest != result.measurement.artefact_digest:
            notes.append("the artefact is not the locked one, though plan, model, libraries and machine are the same")
        same = locked.hardware_fingerprint == prepared.hardware.fingerprint
        if not same:
            notes.append(
                f"the lock was measured on another machine ({locked.hardware_name}): times are not compared, sizes and quality are"
            )
        regressions = compare(
            locked, result.measurement, slack=spec.check.regression_ratio, baseline=_baseline(answer), same_machine=same
        )
    possible = None
    if measured and any(v.outcome == "not met" and v.budget.level == "error" for v in result.verdicts):
        progress.line("a budget is not met: looking for a plan that is predicted to meet all")
        possible = predicting.predicted(prepared)
    return CheckResult(
        name=name_of(spec), result=result, regressions=tuple(regressions), notes=tuple(notes),
        measured=measured, answer=answer, lock=locked, main=main, changes=changes(main, answer, result) if main else (),
        predicted=possible,
    )  # fmt: skip


def _main_lock(baseline: Path | None, own: Lock | None) -> tuple[Lock | None, list[str]]:
    """Return the lock to show beside today's figures. One that cannot be read does not stop who is replacing it."""
    if baseline is None:
        return own, []
    try:
        return read_lock(baseline), []
    except BadInput as error:
        if own is None:
            raise
        return own, [f"the baseline cannot be read ({error.message}): the spec's own lock is shown"]


def name_of(spec: Spec) -> str:
    """Return what a check is called in comments and test reports, from the spec alone."""
    return spec.name or f"{spec.goal}-{Path(spec.model.source).name}"


def changes(lock: Lock, answer: ParetoSet, result: PlanResult) -> tuple[str, ...]:
    """Return what differs between a lock and today, besides the figures: one clause for each thing."""
    found = []
    if lock.plan.engine != result.plan.engine:
        found.append(f"engine {result.plan.engine}, was {lock.plan.engine}")
    old, new = ({s.technique: s for s in plan.steps} for plan in (lock.plan, result.plan))
    for technique in dict.fromkeys((*old, *new)):
        before, after = old.get(technique), new.get(technique)
        if before != after:
            found.append(f"{after}, was {before}" if before and after else f"with {after}" if after else f"no {before}")
    bits = {m: (b, (result.allocation or {}).get(m)) for m, b in (lock.allocation or {}).items()}
    moved = [f"{m} from {b} to {a}" for m, (b, a) in bits.items() if a not in (b, None)]
    if moved:
        found.append(f"options of {len(moved)} modules: {', '.join(moved[:4])}{', …' if len(moved) > 4 else ''}")
    if lock.plan.model_digest != answer.model.digest:
        found.append("the model's files (weights, config or tokenizer)")
    was, is_now = plain(lock.workload), plain(answer.workload)
    found += [f"{k} {is_now.get(k)}, was {was.get(k)}" for k in {**was, **is_now} if was.get(k) != is_now.get(k)]
    versions = result.measurement.versions if result.measurement else {}
    found += [f"{k} {v}, was {lock.versions[k]}" for k, v in versions.items() if lock.versions.get(k, v) != v]
    if lock.hardware_fingerprint != answer.hardware.fingerprint:
        found.append(
            f"the machine: {answer.hardware.name} ({answer.hardware.fingerprint[:8]}), "
            f"was {lock.hardware_name} ({lock.hardware_fingerprint[:8]})"
        )
    return tuple(found)


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
            if name == "peak_memory_bytes":
                step = max(step, MAPPED_BYTES)
            low, high = sorted((sign * (new.low - old.high * reference), sign * (new.high - old.low * reference)))
            gaps.append((low - step, high + step))
        outcome = "worse" if all(g[0] > 0 for g in gaps) else "better" if all(g[1] < 0 for g in gaps) else "same"
        crowd = crowding(now) if outcome == "worse" and timed(name) else None
        if (not same_machine and not repeatable) or crowd:
            outcome = "not compared"
        change = f"{new.value / old.value - 1:+.1%}" if old.value else "from 0"
        if gaps[0][0] > 0 and outcome == "same":
            change += f", the unchanged model {drift - 1:+.1%}: the machine, not the plan"
        if crowd:
            change += f", while other programs kept {crowd:.1f} cores busy"
        was, is_now = (units.format(figure.value, metric.dimension) for figure in (old, new))
        sentence = f"{metric.label} {is_now}, locked {was} ({change})"
        out.append(Regression(metric=name, locked=old, now=new, outcome=outcome, sentence=sentence, drift=drift))
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
    from planner import predicting
    from planner.judging import judge

    answer = predicting.predicted(prepared)
    problem = predicting.problem_of(prepared)
    reference = problem.price([problem.space.unchanged()]).problem_baseline()
    estimate = cost_models.estimate(plan, problem.model, problem.workload, problem.hardware)
    return answer, PlanResult(
        plan=plan, estimate=estimate, verdicts=judge(prepared.spec.budgets, baseline=reference, estimate=estimate)
    )


def _now() -> float:
    import time

    return time.monotonic()
