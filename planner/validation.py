"""Building and measuring plans on this machine, one candidate process at a time: what turns a plan into a record."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput, CandidateFailed, NoFeasiblePlan
from knowledge_base.registry import engines, techniques
from knowledge_base.serde import digest, file_digest, plain, write_json
from knowledge_base.types import Failure, Figure, Measurement, Plan, Step
from planner import building, energy, fidelity, measuring, retrieval, step_losses
from planner.drafts import draft_for
from planner.foreseeing import choosing_s
from planner.isolation import Limits, Servers
from planner.isolation.worker import asked_of
from planner.load.candidates import CandidateLoad, load_of
from planner.locks import measurement_lock
from planner.recipe import Recipe, write_recipe
from planner.serving import OPERATIONS
from planner.statistics import exact_figure
from planner.step_losses import StepLoss
from planner.store import Record, Store, measurement_key

if TYPE_CHECKING:
    from planner.loop import Run
    from planner.progress import Progress

ATTEMPTS = 2  # a candidate whose planner died under it is tried this often
LASTING = (
    "unsupported",
    "build_error",
    "load_error",
    "non_finite",
    "quality_collapse",
    "output_too_short",
    "invalid_result",
)
CACHES = 64 * 2**20  # weights smaller than this may be read from caches faster than from memory


class Validator:
    """Builds and measures plans of one run. A context manager: leaving it stops every server and candidate."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.spec, self.model, self.hardware = run.spec, run.prepared.model, run.prepared.hardware
        self.allocations: dict[Plan, Mapping[str, str] | None] = {}
        self.baseline_perplexity: Figure | None = None
        effort = measuring.PROTOCOLS[self.spec.search.effort]
        tail = any(b.statistic == "p95" and b.level != "off" for b in self.spec.budgets)
        self.protocol = replace(effort, tail=tail, seed=self.spec.search.seed)
        self.counters = energy.Counters()
        self.load = load_of(self.spec)
        self.servers = Servers(extra_ops=OPERATIONS if self.load else None)

    def __enter__(self) -> Validator:
        for name in self.run.prepared.space.options:
            self.servers.warm(engines.get(name).ENGINE.preload)
        return self

    def __exit__(self, *_: object) -> None:
        self.servers.close()

    # ------------------------------------------------------------ keys

    def key(self, plan: Plan, protocol: measuring.Protocol | None = None) -> str:
        """Return the content key of a plan's measurement here and now."""
        from planner.predicting import versions

        return measurement_key(
            plan=plan, model=self.model.digest, data=self.run.data.id, workload=self.spec.workload, versions=versions(),
            machine=self.hardware.fingerprint, protocol=self._asked(protocol or self.protocol), prices=self.spec.prices,
            allocation=self.allocations.get(plan), **({"draft": draft.digest} if (draft := draft_for(plan, self.model)) else {}),
        )  # fmt: skip

    def _asked(self, protocol: measuring.Protocol) -> dict[str, Any]:
        return {**asdict(protocol), **({"load": self.load.facts} if self.load else {})}

    def known(self, plan: Plan) -> Record | None:
        """Return the plan's record from the store, its artefact made again if it is gone; None to measure it.

        The baseline is only known together with its reference log-probabilities. Budgets have no part in a key, but a
        limit on a 95th percentile asks for more samples: those will do where it was dropped since.
        """
        protocols = dict.fromkeys((self.protocol, replace(self.protocol, tail=True)))
        record = next((r for p in protocols if (r := self.run.store.get(self.key(plan, p)))), None)
        if record is None:
            return None
        if plan == self.run.baseline and not self._reference.exists():
            return None
        if record.measurement.failure is None:
            out = self.run.folder.artefacts / plan.id
            if not out.is_dir() or building.verify(out):
                try:
                    digest = self._copied(plan, record.measurement.artefact_digest) or self._build(plan).digest
                except CandidateFailed:
                    return None
                if digest != record.measurement.artefact_digest:
                    return None
            self._write_recipe(plan, record.measurement.artefact_digest, record.measurement.versions)
        self._remember(plan, record.measurement.figures)
        return record

    def _copied(self, plan: Plan, wanted: str | None) -> str | None:
        """Copy a plan's artefact from an earlier run, which is quicker than building it; None where none has it whole."""
        out, partial = self.run.folder.artefacts / plan.id, self.run.folder.path / "work" / f"{plan.id}-copy"
        for place in self.run.folder.path.parent.glob(f"*/artefacts/{plan.id}"):
            if place == out or place.parent.is_symlink() or building.verify(place):
                continue
            if building.read_manifest(place)["digest"] == wanted:
                shutil.copytree(place, partial, dirs_exist_ok=True)
                shutil.rmtree(out, ignore_errors=True)
                out.parent.mkdir(parents=True, exist_ok=True)
                partial.replace(out)
                return wanted
        return None

    # ------------------------------------------------------------ one plan

    def measure(self, plan: Plan) -> Record:
        """Build a plan, serve with it, score it, and return the record. A failure is a record too."""
        began = time.monotonic()
        figures: dict[str, Figure] = {}
        record: dict[str, Any] = {}
        warnings: list[str] = []
        failure: Failure | None = None
        alone: dict[str, Figure] | None = None
        versions: dict[str, str] = {}
        artefact_digest = None
        stage = "build"
        log = self.run.folder.plan_folder(plan.id) / "log.txt"
        try:
            self._count_attempt(plan)
            built = self._build(plan)
            artefact_digest = built.digest
            figures["build_s"] = exact_figure(built.seconds, f"peak memory {built.peak_bytes} bytes")
            record |= {"notes": dict(built.notes), "step_s": dict(built.step_s), "build_peak_bytes": built.peak_bytes}
            stage = "open"
            with self._started(plan, "measure") as candidate:
                job = self._open(candidate, plan, built.folder)
                stage = "measure"
                observed = measuring.screen(
                    job,
                    self._protocol_in_time(),
                    self.hardware,
                    counters=self.counters,
                    progress=self._tick(plan),
                    waiting=self.run.progress.line,
                )
                figures |= observed.figures
                record |= observed.protocol
                warnings += observed.warnings
                versions |= observed.versions
                stage = "quality"
                with measurement_lock(waiting=self.run.progress.line) as waited_s:
                    candidate.grant(waited_s)
                    figures |= self._quality(plan, candidate, warnings)
                candidate.call("close", {}, timeout_s=60)
            if self.load:
                stage = "measure"
                loaded = self._under_load(plan, self.load, built.folder)
                alone = {name: figures[name] for name in loaded.figures if name in figures}
                figures |= loaded.figures
                record["load"] = dict(loaded.protocol)
                record["other_cores"] = max(record["other_cores"], loaded.protocol.get("other_cores") or 0.0)
                warnings += loaded.warnings
        except CandidateFailed as error:
            failure = Failure(kind=error.kind, stage=stage, message=error.message, log=self._relative(log))
        except _Collapsed as collapsed:
            figures |= collapsed.figures
            failure = collapsed.failure
        record |= {
            "wall_s": time.monotonic() - began,
            "data": self.run.data.id,
            "threads_of_machine": self.hardware.device.cores,
        }
        measurement = Measurement(
            plan=plan, key=self.key(plan), hardware_fingerprint=self.hardware.fingerprint, figures=figures, alone=alone, failure=failure,
            artefact_digest=artefact_digest, protocol=record, versions=versions, warnings=tuple(warnings),
            taken_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), sequence=len(self.run.known.records),
        )  # fmt: skip
        self._remember(plan, figures)
        self._write_recipe(plan, artefact_digest, versions)
        return Record(
            measurement=measurement,
            model=self.model,
            workload=self.spec.workload,
            allocation=self.allocations.get(plan),
        )

    def interleave(
        self, baseline: Plan, plans: Sequence[Plan], records: Mapping[Plan, Record], time_left_s: float
    ) -> dict[Plan, tuple[Record, Mapping[str, Figure]]]:
        """Measure plans again in blocks interleaved with the baseline; return new records and paired ratios.

        As many plans take part as fit into the memory limit side by side. A candidate that fails here leaves the
        records as they were.
        """
        chosen, used = [baseline], _peak(records[baseline])
        for plan in plans:
            if used + _peak(records[plan]) <= self._limits().memory_bytes:
                chosen.append(plan)
                used += _peak(records[plan])
        if len(chosen) == 1:
            self.run.progress.line("memory holds no finalist beside the unchanged model: they were measured one by one")
            return {}
        protocol = replace(self.protocol, blocks_s=max(5.0, min(self.protocol.blocks_s, time_left_s - 10.0)))
        try:
            with contextlib.ExitStack() as candidates:
                jobs = {
                    plan.id: self._open(
                        candidates.enter_context(self._started(plan, "finals")),
                        plan,
                        self.run.folder.artefacts / plan.id,
                    )
                    for plan in chosen
                }
                observed = measuring.interleave(
                    jobs, baseline.id, protocol, self.hardware, counters=self.counters, progress=lambda what, done: self.run.progress.tick(what),
                    waiting=self.run.progress.line,
                )  # fmt: skip
        except CandidateFailed as error:
            self.run.progress.line(f"interleaved measurement given up: {error.kind}: {error.message}")
            return {}
        out = {}
        for plan in chosen:
            old, new = records[plan].measurement, observed[plan.id]
            measurement = replace(
                old,
                figures={**old.figures, **new.figures},
                protocol={**old.protocol, **new.protocol},
                warnings=(*old.warnings, *new.warnings),
            )
            out[plan] = (replace(records[plan], measurement=measurement), new.ratios)
        return out

    @contextlib.contextmanager
    def trying_steps(self) -> Iterator[Callable[[Step, float], StepLoss]]:
        """Give a function that returns what a rewriting step alone loses, found within so many seconds.

        What is in the store is not tried again. What the machine had too little of is not kept: it may go another time.
        """
        trial: step_losses.Trial | None = None

        def tick(what: str, done: float) -> None:
            self.run.progress.tick(what)

        def loss_of(step: Step, time_limit_s: float) -> StepLoss:
            nonlocal trial
            calibration = self.run.data.calibration
            assert calibration is not None
            path, until = self._step_path(step, calibration), time.monotonic() + time_limit_s
            if known := step_losses.kept(path):
                return known
            if step_losses.memory_bytes(self.model, step) > self._limits().memory_bytes:
                return StepLoss(step=step, why="memory does not hold the model twice")
            try:
                if trial is None:
                    started = self._started(self.run.baseline, "steps", building.builder_preload(()))
                    trial = step_losses.Trial.of(
                        processes.enter_context(started), self.model, model_folder=self._model_folder, calibration=calibration,
                        seed=self.spec.search.seed, allow_pickle=self.run.settings.allow_pickle,
                        time_limit_s=time_limit_s, progress=tick,
                    )  # fmt: skip
                loss = trial.loss_of(step, time_limit_s=max(0.0, until - time.monotonic()), progress=tick)
            except CandidateFailed as error:
                trial = None
                processes.close()
                return StepLoss(step=step, why=f"{error.kind}: {error.message}")
            write_json(path, plain(loss))
            return loss

        with contextlib.ExitStack() as processes:
            yield loss_of

    # ------------------------------------------------------------ parts

    def allocate(self, plan: Plan) -> None:
        """Choose what each part of the model gets, for a plan whose steps ask for it, where that was measured before.

        Else it is chosen while the plan is built, when the model is as those steps will find it.

        Raises:
            CandidateFailed: nothing fits what a step asks for.
        """
        waiting = _allocating(plan)
        if plan in self.allocations or not all(self._options_path(plan, number).exists() for number in waiting):
            return
        chosen: dict[str, str] = {}
        for number in waiting:
            measured = json.loads(self._options_path(plan, number).read_text(encoding="utf-8"))
            chosen |= _chosen(plan.steps[number], measured)
        if chosen:
            self.allocations[plan] = chosen

    def _options_path(self, plan: Plan, number: int) -> Path:
        """Return where is kept what a step of a plan can choose from: the same for every plan that begins alike."""
        from planner.predicting import versions

        steps, machine, step = plan.steps[:number], self.hardware.fingerprint, plan.steps[number]
        asked = [step.technique, asked_of(step)]
        known = [self.model.digest, self.run.data.id, self.spec.search.seed, steps, asked]
        return self.run.store.folder / "options" / f"{digest([*known, machine, versions()])[:32]}.json"

    def _step_path(self, step: Step, calibration: Path) -> Path:
        """Return where is kept what a step alone loses, for every workload and machine."""
        from planner.predicting import versions

        known = [self.model.digest, file_digest(calibration), self.spec.search.seed, step, versions()]
        return self.run.store.folder / "step-losses" / f"{digest(known)[:32]}.json"

    def _build(self, plan: Plan) -> building.BuildResult:
        self.allocate(plan)

        def allocate(number: int, measure: Callable[[float], Any]) -> Mapping[str, str]:
            path = self._options_path(plan, number)
            if path.exists():
                measured = json.loads(path.read_text(encoding="utf-8"))
            else:
                self.run.progress.line(f"measuring what {plan.steps[number].technique} can choose from")
                measured = measure(choosing_s(self.spec))
                write_json(path, measured)
            return _chosen(plan.steps[number], measured)

        built = building.build(
            self.servers, plan, self.model, model_folder=self._model_folder, out=self.run.folder.artefacts / plan.id, limits=self._limits(),
            workspace=self.run.folder.path / "work" / plan.id, log=self._log(plan), allocation=self.allocations.get(plan),
            allocate=allocate, calibration=self.run.data.calibration, seed=self.spec.search.seed,
            allow_pickle=self.run.settings.allow_pickle, unfinished=self.run.store.unfinished, progress=self._tick(plan),
        )  # fmt: skip
        if built.allocation:
            self.allocations[plan] = built.allocation
        return built

    def _quality(self, plan: Plan, candidate: Any, warnings: list[str]) -> Mapping[str, Figure]:
        data = self.run.data
        heldout = fidelity.Heldout(
            windows=data.heldout,
            count=data.windows,
            positions=data.positions,
            vocabulary=self.model.vocab_size,
            reference=self._reference,
        )
        if plan == self.run.baseline:
            return fidelity.write_reference(candidate, heldout, progress=self._tick(plan))
        assert self.baseline_perplexity is not None, "the baseline is measured first"
        observed = fidelity.observe(
            candidate, heldout, self.baseline_perplexity, seed=self.spec.search.seed, progress=self._tick(plan)
        )
        warnings += observed.warnings
        if observed.failure:
            raise _Collapsed(observed.figures, observed.failure)
        recalled = retrieval.observe(
            candidate, data.prompts, prompt_tokens=self.spec.workload.prompt_tokens,
            context_tokens=self.model.max_context_tokens, seed=self.spec.search.seed, progress=self._tick(plan),
        )  # fmt: skip
        warnings += recalled.warnings
        return {**observed.figures, **recalled.figures}

    def _open(self, candidate: Any, plan: Plan, folder: Path) -> measuring.Job:
        return measuring.open_artefact(
            candidate,
            folder,
            self.spec.workload,
            self.run.data.prompts,
            read_s=self._read_s(plan),
            progress=self._tick(plan),
        )

    def _under_load(self, plan: Plan, load: CandidateLoad, folder: Path) -> measuring.Observed:
        return load.observe(
            folder, self.run.data.prompts, self.hardware, servers=self.servers, limits=self._limits(), log=self._log(plan),
            most_s=self.run.time_left() / 4, progress=self._tick(plan), waiting=self.run.progress.line,
        )  # fmt: skip

    def _read_s(self, plan: Plan) -> float:
        """Return the least time one read of the weights takes: no decode step can be faster. 0 when unknown."""
        from cost_models.demand import chains, step_read_bytes

        read_bytes = float(step_read_bytes(chains(self.model, self.spec.workload).node(plan).demand))
        fastest = self.hardware.device.memory_bytes_per_s
        # Half again as fast as was measured: the probe need not have found the machine at its best.
        return read_bytes / (1.5 * fastest) if read_bytes > CACHES and fastest else 0.0

    @contextlib.contextmanager
    def _started(self, plan: Plan, purpose: str, preload: tuple[str, ...] | None = None) -> Iterator[Any]:
        """A candidate process with a folder of its own, both gone afterwards. `preload`: None for what the engine needs."""
        folder = self.run.folder.path / "work" / f"{plan.id}-{purpose}"
        try:
            with self.servers.start(
                preload or engines.get(plan.engine).ENGINE.preload,
                folder=folder,
                limits=self._limits(),
                log=self._log(plan),
            ) as candidate:
                yield candidate
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _limits(self) -> Limits:
        wanted = self.spec.limits
        return Limits(
            memory_bytes=min(wanted.memory_bytes or self.hardware.memory_limit_bytes, self.hardware.memory_limit_bytes),
            time_s=min(wanted.time_per_candidate_s, max(10.0, self.run.time_left())),
            disk_bytes=wanted.disk_bytes,
        )

    def _protocol_in_time(self) -> measuring.Protocol:
        left = max(3.0, self.run.time_left() / 4)
        return replace(self.protocol, most_s=min(self.protocol.most_s, left), tail_s=min(self.protocol.tail_s, left))

    def _count_attempt(self, plan: Plan) -> None:
        """Note that a candidate starts; refuse the third start of one under which the planner died twice."""
        path = self.run.folder.plan_folder(plan.id) / "attempts.json"
        attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"] if path.exists() else 0
        measured = (path.parent / "measurement.json").exists()
        if attempts >= ATTEMPTS and not measured:
            raise CandidateFailed("killed", f"the planner ended {attempts} times while this candidate ran")
        write_json(path, {"attempts": 1 if measured else attempts + 1})

    def _remember(self, plan: Plan, figures: Mapping[str, Figure]) -> None:
        if plan == self.run.baseline and "perplexity" in figures:
            self.baseline_perplexity = figures["perplexity"]

    def _write_recipe(self, plan: Plan, artefact_digest: str | None, versions: Mapping[str, str]) -> None:
        calibration, draft = self.spec.calibration, draft_for(plan, self.model)
        recipe = Recipe(
            plan=plan, model=self.spec.model.source if not Path(self._model_folder).is_dir() else str(self._model_folder),
            revision=self.spec.model.revision, model_digest=self.model.digest,
            draft=draft.source if draft else None, draft_digest=draft.digest if draft else None,
            calibration=str(Path(calibration.data).resolve()) if calibration and calibration.data else None,
            calibration_samples=calibration.samples if calibration else None, seed=self.spec.search.seed,
            allocation=self.allocations.get(plan), artefact_digest=artefact_digest, versions=versions,
        )  # fmt: skip
        write_recipe(self.run.folder.plan_folder(plan.id), recipe)

    def _tick(self, plan: Plan) -> Any:
        return lambda what, done: self.run.progress.tick(f"{plan.id}: {what}")

    def _log(self, plan: Plan) -> Path:
        return self.run.folder.plan_folder(plan.id) / "log.txt"

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.run.folder.path))

    @property
    def _reference(self) -> Path:
        return self.run.store.references / f"{digest([self.model.digest, self.run.data.id])[:32]}.npy"

    @property
    def _model_folder(self) -> Path:
        assert self.run.prepared.folder is not None
        return self.run.prepared.folder.resolve()


class _Collapsed(Exception):
    """A plan's quality collapsed: its figures are kept beside the failure."""

    def __init__(self, figures: Mapping[str, Figure], failure: Failure) -> None:
        super().__init__(failure.message)
        self.figures, self.failure = figures, failure


def _allocating(plan: Plan) -> list[int]:
    """Return the numbers of the steps that execute an allocation: their files have `options` and `budgets`."""
    return [i for i, step in enumerate(plan.steps) if hasattr(techniques.get(step.technique), "options")]


def _chosen(step: Step, measured: Mapping[str, Any]) -> dict[str, str]:
    """Return the option of each part: the least loss within what the step's knobs allow.

    Raises:
        CandidateFailed: nothing fits.
    """
    from search.allocation import allocate

    try:
        budgets = techniques.get(step.technique).budgets(measured, **step.knobs)
        return dict(allocate(measured["parts"], budgets, ties=measured.get("ties", ())).chosen)
    except (NoFeasiblePlan, BadInput) as error:
        raise CandidateFailed("unsupported", f"{step}: {error.message}", hint=error.hint) from error


def _peak(record: Record) -> float:
    figure = record.measurement.figures.get("peak_memory_bytes")
    return figure.value if figure else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """An artefact built from a recipe."""

    folder: Path
    digest: str
    bytes: int


def rebuild(recipe: Recipe, out: Path, *, store: Path, progress: Progress, offline: bool = False) -> Rebuilt:
    """Build a recipe's artefact into `out`.

    Raises:
        BadInput: its model or calibration text is missing or another one than it was; CandidateFailed: the build failed.
    """
    import tempfile

    from planner.data import CALIBRATION_TOKENS, CALIBRATION_WINDOWS, calibration_windows, save_windows
    from planner.machine import find
    from planner.reading import read_model

    read = read_model(recipe.model, revision=recipe.revision, offline=offline, draft=recipe.draft)
    if read.folder is None or read.model.digest != recipe.model_digest:
        raise BadInput(
            "the model is not the one the plan was made for",
            where=recipe.model,
            hint="give the right one with --model, or plan again",
        )
    if recipe.draft_digest and (read.model.draft is None or read.model.draft.digest != recipe.draft_digest):
        raise BadInput(
            "the draft is not the one the plan was made for",
            where=recipe.draft,
            hint="give the right one with --draft, or plan again",
        )
    hardware = find("local", store)
    with tempfile.TemporaryDirectory(dir=out.resolve().parent, prefix=".leanplan-build-") as work:
        calibration = None
        if recipe.calibration:
            rows = calibration_windows(
                Path(recipe.calibration),
                read.folder,
                recipe.calibration_samples or CALIBRATION_WINDOWS,
                min(CALIBRATION_TOKENS, read.model.max_context_tokens),
            )
            calibration = save_windows(Path(work) / "calibration.npy", rows)
        limits = Limits(memory_bytes=hardware.memory_limit_bytes, time_s=24 * 3600.0, disk_bytes=2**50)
        with Servers() as servers:
            if out.is_dir():
                out.rmdir()
            built = building.build(
                servers, recipe.plan, read.model, model_folder=read.folder, out=out, limits=limits, workspace=Path(work) / "candidate",
                log=Path(work) / "log.txt", allocation=recipe.allocation, calibration=calibration, seed=recipe.seed,
                unfinished=Store(store).unfinished, progress=lambda what, done: progress.tick(what),
            )  # fmt: skip
    progress.done()
    return Rebuilt(folder=out, digest=built.digest, bytes=built.bytes)
