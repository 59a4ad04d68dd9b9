"""Building and measuring plans on this machine, one candidate process at a time: what turns a plan into a record."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput, CandidateFailed
from knowledge_base.registry import engines
from knowledge_base.serde import digest, write_json
from knowledge_base.types import Failure, Figure, Measurement, Plan
from planner import building, energy, fidelity, measuring
from planner.isolation import Limits, Servers
from planner.locks import measurement_lock
from planner.recipe import Recipe, write_recipe
from planner.statistics import exact_figure
from planner.store import Record, measurement_key

if TYPE_CHECKING:
    from planner.loop import Run
    from planner.progress import Progress

ATTEMPTS = 2  # a candidate whose planner died under it is tried this often
SENSITIVITY_SHARE = 0.15  # of the time limit that measuring per-layer sensitivities may take
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
        self.allocations: dict[Plan, Mapping[str, int] | None] = {}
        self.baseline_perplexity: Figure | None = None
        effort = measuring.PROTOCOLS[self.spec.search.effort]
        tail = any(b.statistic == "p95" and b.level != "off" for b in self.spec.budgets)
        self.protocol = replace(effort, tail=tail, seed=self.spec.search.seed)
        self.counters = energy.Counters()
        self.servers = Servers()

    def __enter__(self) -> Validator:
        for name in self.run.prepared.space.options:
            self.servers.warm(engines.get(name).ENGINE.preload)
        return self

    def __exit__(self, *_: object) -> None:
        self.servers.close()

    # ------------------------------------------------------------ keys

    def key(self, plan: Plan) -> str:
        """Return the content key of a plan's measurement here and now."""
        from planner.loop import versions

        return measurement_key(
            plan=plan, model=self.model.digest, data=self.run.data.id, workload=self.spec.workload, versions=versions(),
            machine=self.hardware.fingerprint, protocol=asdict(self.protocol), prices=self.spec.prices,
            allocation=self.allocations.get(plan),
        )  # fmt: skip

    def known(self, plan: Plan) -> Record | None:
        """Return the plan's record from the store, its artefact made again if it is gone; None to measure it.

        The baseline is only known together with its reference log-probabilities.
        """
        record = self.run.store.get(self.key(plan))
        if record is None:
            return None
        if plan == self.run.baseline and not self._reference.exists():
            return None
        if record.measurement.failure is None:
            out = self.run.folder.artefacts / plan.id
            if not out.is_dir() or building.verify(out):
                try:
                    built = self._build(plan)
                except CandidateFailed:
                    return None
                if built.digest != record.measurement.artefact_digest:
                    return None
            self._write_recipe(plan, record.measurement.artefact_digest, record.measurement.versions)
        self._remember(plan, record.measurement.figures)
        return record

    # ------------------------------------------------------------ one plan

    def measure(self, plan: Plan) -> Record:
        """Build a plan, serve with it, score it, and return the record. A failure is a record too."""
        began = time.monotonic()
        figures: dict[str, Figure] = {}
        record: dict[str, Any] = {}
        warnings: list[str] = []
        failure: Failure | None = None
        versions: dict[str, str] = {}
        artefact_digest = None
        stage = "build"
        log = self.run.folder.plan_folder(plan.id) / "log.txt"
        try:
            self._count_attempt(plan)
            built = self._build(plan)
            artefact_digest = built.digest
            figures["build_s"] = exact_figure(built.seconds, f"peak memory {built.peak_bytes} bytes")
            record |= {"notes": dict(built.notes), "step_s": dict(built.step_s)}
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
            plan=plan, key=self.key(plan), hardware_fingerprint=self.hardware.fingerprint, figures=figures, failure=failure,
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

    # ------------------------------------------------------------ parts

    def allocate(self, plan: Plan) -> None:
        """Choose the bits of each layer for a plan that asks for it, from measured sensitivities (a MILP).

        Raises:
            CandidateFailed: the sensitivities could not be measured.
        """
        step = plan.step("weight_mixed")
        if step is None or plan in self.allocations:
            return
        from search.allocation import allocate_bits

        allocation = allocate_bits(self._sensitivities(), average_bits=float(step.knobs["average_bits"]))
        self.allocations[plan] = dict(allocation.bits)

    def _sensitivities(self) -> dict[str, Any]:
        key = digest([self.model.digest, self.run.data.id, self.spec.search.seed])[:32]
        path = self.run.store.folder / "sensitivities" / f"{key}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        self.run.progress.line("measuring how much each layer's weights matter")
        workspace = self.run.folder.path / "work" / "sensitivities"
        log = self.run.folder.path / "plans" / "sensitivities.txt"
        limits = self._limits()
        with self.servers.start(building.builder_preload(()), folder=workspace, limits=limits, log=log) as candidate:
            payload = {
                "model_folder": str(self._model_folder), "model": _plain(self.model), "seed": self.spec.search.seed,
                "allow_pickle": self.run.settings.allow_pickle,
                "calibration": str(self.run.data.calibration) if self.run.data.calibration else None,
                "options": {"time_limit_s": max(10.0, SENSITIVITY_SHARE * self.spec.search.time_limit_s)},
            }  # fmt: skip
            found = candidate.call("sensitivities", payload, timeout_s=limits.time_s, progress=self._tick(None))[
                "sensitivities"
            ]
        write_json(path, found)
        return found

    def _build(self, plan: Plan) -> building.BuildResult:
        self.allocate(plan)
        return building.build(
            self.servers, plan, self.model, model_folder=self._model_folder, out=self.run.folder.artefacts / plan.id, limits=self._limits(),
            workspace=self.run.folder.path / "work" / plan.id, log=self._log(plan), allocation=self.allocations.get(plan),
            calibration=self.run.data.calibration, seed=self.spec.search.seed,
            allow_pickle=self.run.settings.allow_pickle, progress=self._tick(plan),
        )  # fmt: skip

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
        return observed.figures

    def _open(self, candidate: Any, plan: Plan, folder: Path) -> measuring.Job:
        return measuring.open_artefact(
            candidate,
            folder,
            self.spec.workload,
            self.run.data.prompts,
            read_s=self._read_s(plan),
            progress=self._tick(plan),
        )

    def _read_s(self, plan: Plan) -> float:
        """Return the least time one read of the weights takes: no decode step can be faster. 0 when unknown."""
        from cost_models.demand import chains, step_read_bytes

        read_bytes = float(step_read_bytes(chains(self.model, self.spec.workload).node(plan).demand))
        fastest = self.hardware.device.memory_bytes_per_s
        # Half again as fast as was measured: the probe need not have found the machine at its best.
        return read_bytes / (1.5 * fastest) if read_bytes > CACHES and fastest else 0.0

    @contextlib.contextmanager
    def _started(self, plan: Plan, purpose: str) -> Iterator[Any]:
        """A candidate process with a folder of its own, both gone afterwards."""
        folder = self.run.folder.path / "work" / f"{plan.id}-{purpose}"
        try:
            with self.servers.start(
                engines.get(plan.engine).ENGINE.preload, folder=folder, limits=self._limits(), log=self._log(plan)
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
        calibration = self.spec.calibration
        recipe = Recipe(
            plan=plan, model=self.spec.model.source if not Path(self._model_folder).is_dir() else str(self._model_folder),
            revision=self.spec.model.revision, model_digest=self.model.digest,
            calibration=str(Path(calibration.data).resolve()) if calibration and calibration.data else None,
            calibration_samples=calibration.samples if calibration else None, seed=self.spec.search.seed,
            allocation=self.allocations.get(plan), artefact_digest=artefact_digest, versions=versions,
        )  # fmt: skip
        write_recipe(self.run.folder.plan_folder(plan.id), recipe)

    def _tick(self, plan: Plan | None) -> Any:
        name = plan.id if plan else "sensitivities"
        return lambda what, done: self.run.progress.tick(f"{name}: {what}")

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


def _peak(record: Record) -> float:
    figure = record.measurement.figures.get("peak_memory_bytes")
    return figure.value if figure else 0.0


def _plain(value: Any) -> Any:
    from knowledge_base.serde import plain

    return plain(value)


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

    read = read_model(recipe.model, revision=recipe.revision, offline=offline)
    if read.folder is None or read.model.digest != recipe.model_digest:
        raise BadInput(
            "the model is not the one the plan was made for",
            where=recipe.model,
            hint="give the right one with --model, or plan again",
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
                progress=lambda what, done: progress.tick(what),
            )  # fmt: skip
    progress.done()
    return Rebuilt(folder=out, digest=built.digest, bytes=built.bytes)
