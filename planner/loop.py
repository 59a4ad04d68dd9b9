"""The loop: prepare, search, validate, calibrate, choose again, answer. What `leanplan plan` and `planner.plan` run."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem, Terminated
from knowledge_base.metrics import find_metric
from knowledge_base.serde import digest, plain
from knowledge_base.types import Estimate, Measurement, Plan, Step
from planner import answering
from planner.downloading import Download
from planner.foreseeing import BUILD_SHARE, experience, finalists_in, finals_reserve_s, foresee, trying_s
from planner.judging import judge
from planner.predicting import infeasible, learned, predicted, prices, problem_of, search_plans, spec_facts, versions
from planner.preparing import Prepared, in_part, memory_limit_bytes, prepare, told_in_part
from planner.progress import Progress
from planner.results import ParetoSet, PlanResult
from planner.room import Room, room
from planner.run_folder import RunFolder
from planner.run_forecast import RunForecast, in_short
from planner.step_losses import StepLoss, can_be_tried, with_losses
from planner.store import Record, Store

if TYPE_CHECKING:
    from planner.observing import Observer
    from planner.spec import Spec
    from planner.validation import Validator
    from search.problem import Priced, Problem

STOP_GRACE_S = 10.0
PROBED_S = 5.0  # preparing takes longer than this only where the machine was probed


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a run is carried out, apart from what the spec says."""

    run_root: Path
    store_root: Path
    predict: bool = False
    fresh: bool = False
    resume: str | None = None
    offline: bool = False
    trust_remote_code: str | None = None
    allow_pickle: bool = False


def run(spec: Spec, settings: Settings, progress: Progress) -> ParetoSet:
    """Plan a spec and return the answer; with measurements unless only prediction is wanted or possible.

    Raises:
        LeanplanError: bad input, or the environment stands in the way. A failing candidate raises nothing.
    """
    measured = spec.hardware == "local" and not settings.predict
    began = time.monotonic()
    download = Download.of(spec, offline=settings.offline, allow_pickle=settings.allow_pickle) if measured else None
    prepared = prepare(
        spec, store=settings.store_root, predict=settings.predict, offline=settings.offline,
        trust_remote_code=settings.trust_remote_code, allow_pickle=settings.allow_pickle, tell=progress.line,
    )  # fmt: skip
    started = time.monotonic()  # the limit is for search and measurements: a machine is probed once, in half a minute
    for note in prepared.notes:
        progress.line(note)
    left_out = f"; {len(prepared.refused)} things left out" if prepared.refused else ""
    progress.line(
        f"{prepared.model.name}: {prepared.model.params_total / 1e6:.1f} M parameters; engines {', '.join(prepared.space.options)}; "
        f"up to {prepared.space.count():,} plans{left_out}"
    )
    if download is None:
        return predicted(prepared)
    return Run(prepared, settings, progress, started, prepared_s=started - began, download=download).go()


@dataclass(slots=True)
class Progressing:
    """What a run knows so far."""

    records: dict[Plan, Record] = field(default_factory=dict)
    before: dict[Plan, Estimate] = field(default_factory=dict)  # predictions made before each plan was measured
    why_tried: dict[Plan, str] = field(default_factory=dict)
    finalists: dict[Plan, Mapping[str, Any]] = field(default_factory=dict)  # plan -> paired ratios
    step_losses: list[StepLoss] = field(default_factory=list)

    def good(self) -> dict[Plan, Record]:
        return {p: r for p, r in self.records.items() if r.measurement.failure is None}

    def measurements(self) -> list[Measurement]:
        return [r.measurement for r in self.records.values()]


class Run:
    """One measured run. State that matters is in the store and the run folder; this object can be lost at any time."""

    def __init__(
        self, prepared: Prepared, settings: Settings, progress: Progress, started: float, *,
        prepared_s: float = 0.0, download: Download | None = None,
    ) -> None:  # fmt: skip
        self.prepared, self.settings, self.progress, self.started = prepared, settings, progress, started
        self.prepared_s, self.download = prepared_s, download
        self.forecast: RunForecast | None = None
        self.observer: Observer | None = None
        self.taken: dict[str, float] = {}  # seconds by stage of the forecast
        self.measured_here = 0
        self.spec = prepared.spec
        self.store = Store(settings.store_root)
        self.known = Progressing()
        self.seconds: dict[str, float] = {}
        self.stopping = 0  # the signal that asked to stop
        self.infeasible: dict[str, int] = {}
        self.priced_plans = 0

    # ------------------------------------------------------------ the stages

    def go(self, only: tuple[Plan, Mapping[str, str] | None] | None = None) -> ParetoSet:
        """Run every stage and return the answer. Ctrl-C answers with what is known and raises KeyboardInterrupt.

        Args:
            only: a plan and its allocation to measure beside the unchanged model, instead of searching.
        """
        from planner.data import prepare_data
        from planner.locks import RunLock
        from planner.observing import Observer
        from planner.reading import check_complete, check_finite
        from planner.validation import Validator

        assert self.prepared.folder is not None
        self.store.require_writable()
        if only is None:
            with self._timed("search"):
                self.forecast = self._foresee()
            self.progress.line(in_short(self.forecast))
        self._require_room()
        with self._timed("read"):
            check_complete(self.prepared.folder)
            check_finite(self.prepared.folder)
            self.data = prepare_data(self.spec, self.prepared.model, self.prepared.folder, self.store.folder)
        for note in self.data.notes:
            self.progress.line(note)
        self.folder = self._open_folder()
        on_gpu = self.prepared.hardware.device.kind == "gpu"
        self.observer = Observer((self.folder.path, self.store.folder), device=on_gpu)
        with RunLock(self.folder.path), Validator(self) as validator, self._polite_stop(validator):
            try:
                with self.observer:
                    self._stages(validator, only)
            except BaseException as stop:
                if not self._is_stop(stop):
                    raise
                self.folder.event("interrupted")
                if self.known.good():
                    self._answer(finished=False)
                self.progress.line("interrupted; the same command resumes this run with nothing lost")
                if self.stopping == signal.SIGTERM:
                    raise Terminated from stop
                raise
            answer = self._answer(finished=True)
        return answer

    def _stages(self, validator: Validator, only: tuple[Plan, Mapping[str, str] | None] | None) -> None:
        self.progress.stage("unchanged model")
        self._baseline(validator)
        self.progress.stage("candidates")
        if only is None:
            self._explore(validator)
            self._require_a_success()
        else:
            validator.allocations[only[0]] = only[1]
            validator.protocol = replace(validator.protocol, blocks=self.spec.check.runs)
            self.known.before[only[0]] = self._estimate(only[0], None)
            self._measure(validator, only[0], "the locked plan")
        self._finals(validator)

    def _open_folder(self) -> RunFolder:
        from planner.spec import as_yaml

        fingerprint = digest(
            [
                spec_facts(self.spec),
                self.prepared.model.digest,
                *([draft.digest] if (draft := self.prepared.model.draft) else []),
                self.prepared.hardware.fingerprint,
                self.data.id,
                versions(),
            ]
        )
        title = f"{self.spec.goal}-{self.prepared.model.name}"
        if self.settings.resume:
            path = Path(self.settings.resume)
            path = path if path.is_dir() else self.settings.run_root / self.settings.resume
            folder, resumed = RunFolder(path), True
            if not (path / "run.json").is_file():
                raise BadInput(f"no run `{self.settings.resume}`", hint="leanplan ls runs")
        else:
            folder, resumed = RunFolder.open(
                self.settings.run_root, fingerprint=fingerprint, title=title, fresh=self.settings.fresh
            )
        if resumed:
            folder.refuse_links()
            self.progress.line(f"resuming {folder.path}: {folder.progress}")
        else:
            folder.write("spec.yaml", as_yaml(self.spec))
        folder.event("resumed" if resumed else "started", model=self.prepared.model.digest, versions=versions())
        return folder

    def _baseline(self, validator: Validator) -> None:
        plan = self.baseline = self.prepared.space.unchanged()
        if plan.steps:
            self.progress.line(told_in_part(self.prepared))
        self.known.before[plan] = self._estimate(plan, None)
        record = self._measure(validator, plan, "the model as it came")
        failure = record.measurement.failure
        if failure and failure.kind == "oom_host" and not plan.steps and self._compare_with_part():
            del self.known.records[plan]
            self._baseline(validator)
        elif failure:
            raise EnvironmentProblem(
                f"the model as it came does not run here ({failure.kind}: {failure.message}): relative budgets cannot be judged",
                hint="leanplan plan --predict prices plans without running them; leanplan doctor shows what is wrong",
            )

    def _compare_with_part(self) -> bool:
        """Have the unchanged model run with some of it on disk, where memory holds more of it than it really takes."""
        spec, space = self.spec, self.prepared.space
        hardware = replace(self.prepared.hardware, memory_limit_bytes=memory_limit_bytes(spec, self.prepared.hardware))
        reference = in_part(spec, space, self.prepared.model, hardware)
        self.prepared = replace(self.prepared, space=replace(space, reference=reference))
        return reference is not None

    def _explore(self, validator: Validator) -> None:
        from search.choose import choose
        from search.effort import EFFORTS

        effort = EFFORTS[self.spec.search.effort]
        pool: dict[Plan, None] = {}
        while (left := self._measurements_left()) > 0 and self._time_for_another():
            with self._timed("search"):
                everything = self._priced(pool)
            everything = self._with_steps_tried(validator, everything, pool)
            with self._timed("search"):
                problem = everything.problem
                priced, short = self._with_room(everything)
                measured = {p: r.measurement for p, r in self.known.records.items()}
                picks = choose(
                    priced, min(effort.batch, left), known=set(measured),
                    collapsed=[p for p, m in measured.items() if m.collapsed], failed={p for p, m in measured.items() if m.failure},
                    longest_build_s=BUILD_SHARE * self.spec.search.time_limit_s,
                )  # fmt: skip
            self.infeasible = infeasible(everything) | short
            self.priced_plans = len(everything.plans)
            if not picks:
                lacking = f"; others are beyond {', '.join(short)}" if short else ""
                self.progress.line(f"every plan worth measuring has been measured{lacking}")
                return
            for pick in picks:
                if self._measurements_left() <= 0 or not self._time_for_another():
                    return
                if self._with_room(problem.price([pick.plan]))[1]:
                    break  # less is free than a moment ago: choose again among what fits
                self.known.before[pick.plan] = self._estimate(pick.plan, problem.calibration)
                self._measure(validator, pick.plan, pick.why)

    def _priced(self, pool: dict[Plan, None]) -> Priced:
        """Return all plans found so far, priced by what is known by now; what is found now is added to them."""
        problem = self._problem()
        pool |= dict.fromkeys(search_plans(problem, self.spec, already_drawn=len(self.known.records)).plans)
        return problem.price(list(pool))

    def _with_steps_tried(self, validator: Validator, priced: Priced, pool: dict[Plan, None]) -> Priced:
        """Return the plans priced by what their rewriting steps were found to lose alone, as far as there is time for it.

        One setting of each technique that may be of use is tried, then of those that still may.
        """
        with validator.trying_steps() as loss_of:
            while steps := self._steps_to_try(priced):
                found = []
                until = time.monotonic() + self._trying_left_s()
                with self._timed("steps"):
                    for step in steps:
                        self._stop_if_asked()
                        if (left_s := until - time.monotonic()) > 0:
                            found.append(loss_of(step, left_s))
                self._learn_from(found)
                with self._timed("search"):
                    priced = self._priced(pool)
        return priced

    def _steps_to_try(self, priced: Priced) -> list[Step]:
        """Return a setting of each technique that may be of use, the one of most plans; none where the time for it is over."""
        from search.choose import hopeful_steps

        if self._trying_left_s() <= 0:
            return []
        tried = {loss.step for loss in self.known.step_losses}
        hopeful = [step for step in hopeful_steps(priced, can_be_tried) if step not in tried]
        first = {step.technique: step for step in reversed(hopeful)}
        return [step for step in hopeful if first[step.technique] == step]

    def _trying_left_s(self) -> float:
        return trying_s(self.spec, self.prepared.space) - self.seconds.get("steps", 0.0)

    def _learn_from(self, found: list[StepLoss]) -> None:
        """Have plans priced by what steps were found to lose on this model."""
        self.known.step_losses += found
        prepared = self.prepared
        steps = filter(can_be_tried, prepared.space.steps())
        model = with_losses(prepared.model, self.spec.workload, steps, self.known.step_losses)
        self.prepared = replace(prepared, model=model)
        told = [f"{loss.step} {f'{loss.loss.value:+.1%}' if loss.loss else loss.why}" for loss in found]
        self.progress.line(f"perplexity that single steps cost this model, in short: {', '.join(told)}")

    def _require_a_success(self) -> None:
        """Refuse an answer when every one of several candidates failed: the machine is at fault then, not the plans.

        A collapse of quality is an honest result, and so is what a step refuses to do to this model, or that a plan does
        not fit where the model as it came does not either.
        """
        failures = [r.measurement.failure for p, r in self.known.records.items() if p != self.baseline]
        honest = ("quality_collapse", "unsupported", *(("oom_host",) if self.baseline.steps else ()))
        if len(failures) < 2 or any(f is None or f.kind in honest for f in failures):
            return
        groups = [r for r in answering.rejections(self._results(), (), {}) if r.kind == "failed"]
        raise EnvironmentProblem(
            "every candidate failed: " + "; ".join(f"{r.what} ({r.count}×): {r.why}" for r in groups[:3]),
            hint="leanplan doctor shows what is broken; once it is mended, the same command tries them again",
            where=str(self.folder.path / "plans"),
        )

    def _finals(self, validator: Validator) -> None:
        """Measure the best few again, in blocks interleaved with the unchanged model; not where all were under load."""
        if validator.load:
            return
        results = [r for r in self._results() if not answering.failed(r)]
        best = answering.recommend(answering.mark_front(results, self.spec.objectives), self.spec.objectives)
        # What noise leaves undecided may still win: whatever is not surely beyond a budget takes part.
        possible = [
            replace(r, verdicts=()) for r in results if all(v.outcome != "not met" for v in answering.errors(r))
        ]
        near = results if len(results) == 2 else answering.contenders(possible or results, self.spec.objectives)
        baseline = self.baseline
        chosen = [p for p in dict.fromkeys(r.plan for r in (*([best] if best else []), *near)) if p != baseline]
        if not chosen:
            return
        latency_s = fmean(self.known.records[p].measurement.figures["latency_s"].value for p in (baseline, *chosen))
        chosen = chosen[: finalists_in(self.spec.search.effort, latency_s, self.time_left())]
        self.progress.stage("finalists")
        self.progress.line(f"finalists, interleaved with the unchanged model: {', '.join(p.id for p in chosen)}")
        with self._timed("finals"):
            again = validator.interleave(baseline, chosen, self.known.records, self.time_left())
            for plan, (record, ratios) in again.items():
                self._keep(record)
                if plan != baseline:
                    self.known.finalists[plan] = ratios
        if not again:
            del self.seconds["finals"]  # teaches nothing of what they take

    # ------------------------------------------------------------ one plan

    def _measure(self, validator: Validator, plan: Plan, why: str) -> Record:
        """Return the plan's record: from the store if it was measured before, else built and measured now."""
        self.known.why_tried[plan] = why
        self._stop_if_asked()
        record = None
        if not self.settings.fresh:
            with contextlib.suppress(
                CandidateFailed
            ):  # whatever hinders here is met again, and recorded, when measuring
                validator.allocate(plan)
            record = validator.known(plan)
        if record is None:
            self.progress.trying(plan, why, self.known.before.get(plan))
            with self._timed("validate"):
                record = validator.measure(plan)
            self._note_taken(record)
        else:
            self.progress.trying(plan, "known from an earlier run", self.known.before.get(plan))
        self._keep(record)
        self._tell(record)
        if self.forecast is not None:
            self.progress.expect(*self._seconds_left())
        return record

    def _note_taken(self, record: Record) -> None:
        """Add what a measurement took to what the forecast will be compared with."""
        measured = record.measurement
        wall_s = float(measured.protocol["wall_s"])
        build_s = measured.figures["build_s"].value if "build_s" in measured.figures else wall_s
        first = measured.plan == self.baseline
        for stage, seconds in (
            (("unchanged", wall_s),) if first else (("build", build_s), ("measure", wall_s - build_s))
        ):
            self.taken[stage] = self.taken.get(stage, 0.0) + seconds
        self.measured_here += 1
        if self.observer is not None:
            peak = measured.figures.get("peak_memory_bytes")
            self.observer.saw_candidate(max(measured.protocol.get("build_peak_bytes", 0), peak.value if peak else 0))

    def _keep(self, record: Record) -> None:
        plan = record.measurement.plan
        self.known.records[plan] = record
        from planner.validation import LASTING

        failure = record.measurement.failure
        if failure is None or failure.kind in LASTING:  # a time-out or a full disk may not happen again
            self.store.put(record)
        folder = self.folder.plan_folder(plan.id).relative_to(self.folder.path)
        self.folder.write(f"{folder}/measurement.json", plain(record.measurement))
        self.folder.event("measured", plan=plan.id, failure=failure.kind if failure else None)

    def _tell(self, record: Record) -> None:
        from planner.reports._table import figure_text

        results = answering.mark_front(self._results(), self.spec.objectives)
        if failure := record.measurement.failure:
            self.progress.measured(results, f"failed: {failure.kind}: {failure.message}")
            return
        shown = dict.fromkeys(
            [*(find_metric(o)[0].name for o in self.spec.objectives), "ttft_s", "tpot_s", "quality_loss_ratio"]
        )
        parts = [
            f"{find_metric(n)[0].label} {figure_text(record.measurement.figures[n], n)}"
            for n in shown
            if n in record.measurement.figures
        ]
        self.progress.measured(results, ", ".join(parts))

    def _estimate(self, plan: Plan, calibration: Any) -> Estimate:
        import cost_models

        return cost_models.estimate(plan, self.prepared.model, self.spec.workload, self.prepared.hardware, calibration)

    # ------------------------------------------------------------ what it takes

    def _foresee(self) -> RunForecast:
        from planner.forecast import sample

        known = experience(self.store, self.prepared.hardware.fingerprint, self.spec, self.prepared.model.digest)
        missing = self.download.missing_bytes if self.download else 0.0
        some = sample(self._problem())
        fitting = self._room().fitting(some)
        return foresee(
            self.spec, fitting if fitting.plans else some, known, probed=self.prepared_s < PROBED_S, download_bytes=missing,
            fresh=self.settings.fresh,
        )  # fmt: skip

    def _room(self) -> Room:
        return room(self.spec, self.prepared.model, self.prepared.hardware.memory_limit_bytes, self.settings.run_root)

    def _require_room(self) -> None:
        """Refuse a run that memory or disk cannot suffice for, before any work."""
        problem = problem_of(self.prepared)
        if told := self._room().obstacles(self.spec, problem.price([self.prepared.space.unchanged()])):
            what, _, change = told[0].partition(": ")
            raise EnvironmentProblem(what, hint=change, where="limits")

    def _with_room(self, priced: Priced) -> tuple[Priced, dict[str, int]]:
        """Return the plans there is memory and disk for now, and how many are beyond which."""
        there = self._room()
        return there.fitting(priced), {name: int(n.sum()) for name, n in there.beyond(priced).items() if n.any()}

    def _seconds_left(self) -> tuple[float, int]:
        """Return the seconds the rest is expected to take, by the forecast and what was seen since; and the plans left."""
        assert self.forecast is not None
        done = max(0, self.measured_here - 1)
        seen_s = self.taken.get("build", 0.0) + self.taken.get("measure", 0.0)
        each_s = (2 * self.forecast.each_s + seen_s) / (2 + done)
        finals_s = self.forecast.stages_s["finals"].mid
        for_candidates_s = self.time_left() - finals_reserve_s(self.spec)
        count = max(0, min(self._measurements_left(), int(for_candidates_s / max(each_s, 1e-3))))
        return max(0.0, min(self.time_left(), count * each_s + finals_s)), count

    def _took(self) -> RunForecast | None:
        """Return the forecast beside what the run took; None where there was none."""
        if self.forecast is None or self.observer is None:
            return None
        stages = {"prepare": self.prepared_s + self.seconds.get("read", 0.0), **self.taken}
        stages |= {name: self.seconds[name] for name in ("search", "finals") if name in self.seconds}
        if "steps" in self.seconds:
            stages["search"] = stages.get("search", 0.0) + self.seconds["steps"]
        facts = {
            "candidates": float(self.measured_here), "wall_s": self.prepared_s + time.monotonic() - self.started,
            "peak_memory_bytes": float(self.observer.peak_memory_bytes), "disk_bytes": float(self.observer.peak_disk_bytes),
            "peak_device_bytes": float(self.observer.peak_device_bytes),
            "download_bytes": self.download.fetched_bytes if self.download else 0.0,
        }  # fmt: skip
        return self.forecast.with_facts(facts, stages)

    # ------------------------------------------------------------ what is known

    def _problem(self) -> Problem:
        """Return the problem with all that was learned on this machine, in this run and earlier ones."""
        prepared = self.prepared
        measured = [r.measurement for r in self.known.good().values()]
        records = self.store.records(prepared.hardware.fingerprint)
        calibration = learned(records, prepared.model, self.spec.workload, prepared.hardware, measured)
        return problem_of(self.prepared, baseline=self._reference(), calibration=calibration)

    def _reference(self) -> dict[str, float]:
        first = next(iter(self.known.records.values()), None)
        return {name: f.value for name, f in first.measurement.figures.items()} if first else {}

    def _results(self) -> list[PlanResult]:
        from planner.statistics import exact_figure

        reference = self._reference()
        results = []
        for plan, record in self.known.records.items():
            artefact = self.folder.artefacts / plan.id
            ratios = self.known.finalists.get(plan, {})
            if plan == self.baseline:  # nothing is more equal to the unchanged model than itself
                ratios = {name: exact_figure(1.0, "the unchanged model itself") for name in record.measurement.figures}
            results.append(
                PlanResult(
                    plan=plan, estimate=self.known.before.get(plan), measurement=record.measurement,
                    verdicts=() if record.measurement.failure else judge(self.spec.budgets, baseline=reference, measurement=record.measurement, ratios=ratios),
                    finalist=plan in self.known.finalists, ratios=ratios, allocation=record.allocation,
                    artefact=str(artefact.relative_to(self.folder.path)) if artefact.is_dir() else None,
                )
            )  # fmt: skip
        return results

    def _measurements_left(self) -> int:
        return self.spec.search.max_measured - len(self.known.records)

    def time_left(self) -> float:
        """Return the seconds left of the spec's time limit."""
        return self.spec.search.time_limit_s - (time.monotonic() - self.started)

    def _time_for_another(self) -> bool:
        """Whether a candidate of typical length still fits before the finalists' share of the time begins."""
        spent = sorted(r.measurement.protocol.get("wall_s", 0.0) for r in self.known.records.values())
        typical = spent[len(spent) // 2] if spent else 0.0
        if self.time_left() - finals_reserve_s(self.spec) <= typical:
            self.progress.line("the time limit leaves no room for another candidate")
            return False
        if self.forecast is None:
            return True
        over = self.prepared_s + time.monotonic() - self.started + typical + self.forecast.stages_s["finals"].mid
        if over <= self.forecast.amounts["wall_s"].high:
            return True
        self.progress.line(
            "another candidate would take the run beyond what was forecast; the same command goes on from here"
        )
        return False

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begun

    @staticmethod
    def _is_stop(error: BaseException) -> bool:
        return isinstance(error, KeyboardInterrupt | Terminated)

    @contextlib.contextmanager
    def _polite_stop(self, validator: Validator) -> Iterator[None]:
        """First Ctrl-C or SIGTERM: give the running candidate ten seconds, then answer. Second: stop at once."""

        def stop(signum: int, frame: Any) -> None:
            validator.servers.hurry(0.0 if self.stopping else STOP_GRACE_S)
            if not self.stopping:
                self.progress.line(f"stopping: the running candidate has {STOP_GRACE_S:.0f} s; again to stop at once")
            self.stopping = signum

        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread only; whoever runs us there handles them
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        if self.stopping:
            raise KeyboardInterrupt

    # ------------------------------------------------------------ the answer

    def _answer(self, *, finished: bool) -> ParetoSet:
        from cost_models.error_report import error_report
        from planner.study import write_study

        spec = self.spec
        results = answering.mark_front(self._results(), spec.objectives)
        best = answering.recommend(results, spec.objectives)
        with self._timed("search"):
            problem = self._problem()
        price = prices(problem, [r.plan for r in results if r.on_front])
        results = [replace(r, why=answering.reasons(r, results, price, spec.objectives)) for r in results]
        warnings = sorted({w for m in self.known.measurements() for w in m.warnings})
        if self.baseline.steps:
            warnings.insert(0, told_in_part(self.prepared))
        answer = ParetoSet(
            run_id=self.folder.path.name, model=self.prepared.model, hardware=self.prepared.hardware, workload=spec.workload,
            budgets=spec.budgets, objectives=spec.objectives, results=tuple(results), recommended_id=best.plan.id if best else None,
            rejected=answering.rejections(results, self.prepared.refused, self.infeasible),
            sentence=answering.sentence(best, results, spec.objectives, measured=True),
            conflicts=() if best else answering.nearest(results, spec.budgets),
            prediction_errors=error_report(
                (self.known.before[p], r.measurement) for p, r in self.known.good().items() if p in self.known.before
            ),
            search={
                "solver": spec.search.solver, "seed": spec.search.seed, "effort": spec.search.effort,
                "legal_at_most": self.prepared.space.count(), "priced": self.priced_plans,
                "measured": len(results), "why_tried": {p.id: why for p, why in self.known.why_tried.items()},
                "seconds": {k: round(v, 3) for k, v in self.seconds.items()}, "wall_s": round(time.monotonic() - self.started, 3),
            },
            provenance={"versions": versions(), "data": self.data.id, "spec": spec_facts(spec), "warnings": warnings},
            forecast=self._took(), folder=str(self.folder.path),
        )  # fmt: skip
        if finished:
            if answer.forecast:
                self.store.put_forecast(answer.run_id, self.prepared.hardware.fingerprint, answer.forecast)
            write_study(self.folder.path / "study.db", answer)
            answer.save(self.folder.path)
            self.folder.event("finished", recommended=answer.recommended_id)
            self.folder.close()
        else:
            from planner.reports import terminal

            self.folder.write("best-so-far.txt", terminal.render(answer))
            self.progress.done()
            self.progress.line("best so far: " + answer.sentence)
        return answer
