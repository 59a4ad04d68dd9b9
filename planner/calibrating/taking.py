"""Measures a machine for its calibration: small models of two sizes, served by each engine in each weight format.

The smaller model's steps are mostly floor (starting kernels), the larger one's mostly reading weights, so the two
together tell both. The most telling come first; the time limit decides how far it goes. Every measurement is kept at
once, so nothing is lost when it is stopped and nothing is measured twice.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem, Terminated
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines
from knowledge_base.types import Hardware, Measurement, Model, Plan, Step, Workload
from planner import building, measuring
from planner.calibrating import keeping
from planner.isolation import Limits, Servers
from planner.reports._table import figure_text
from planner.store import Record, measurement_key

if TYPE_CHECKING:
    from planner.progress import Progress
    from planner.reading import ReadResult

USUAL_BITS = (4.5, 8.5, 16.0, 2.6)  # stored for each weight, scales included; what most plans choose comes first
GIVEN = "given"  # the size of a model that was given
FIRST_S = 4.0  # what a measurement is taken to need before there was one of its size
LEAST_S = 5.0  # a time limit below this is refused: loading the engines alone takes longer
WORK = "planner.calibrating.work"
DISK_BYTES = 8 * 2**30
LONGEST_S = 120.0  # of one candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Programme:
    """What to measure: models to make by name, the smallest first, under a load; `formats`: only these, None: all."""

    sizes: Mapping[str, Mapping[str, int]]
    workload: Workload
    protocol: measuring.Protocol
    formats: frozenset[str] | None = None

    @property
    def smallest(self) -> str:
        return next(iter(self.sizes))


# 5 and 57 million parameters; matrices with sides of 256 and more, as GGUF's k-quants need. No matrix is as wide as the
# vocabulary: the builder of ONNX Runtime's graphs would take it for the head.
PROGRAMME = Programme(
    sizes={
        "small": {"hidden_size": 256, "layers": 8, "vocab_size": 544},
        "large": {"hidden_size": 1024, "layers": 6, "vocab_size": 544},
    },
    workload=Workload(prompt_tokens=128, output_tokens=17),
    protocol=measuring.Protocol(requests=5, least_s=0.2, most_s=0.8),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A weight format, and the steps that lead to it."""

    name: str
    bits: float  # stored for each weight of the layers
    steps: tuple[Step, ...]
    needs_s: float = 0.0  # predicted to build and to serve it


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One plan on a model of one size."""

    size: str
    engine: str
    form: Format

    def __str__(self) -> str:
        return f"{self.engine} {self.form.name}, {self.size} model"


@dataclass(slots=True)
class Taken:
    """What was measured, and what was not and why."""

    records: list[Record] = field(default_factory=list)
    known: int = 0  # of them, kept from before
    left_out: list[str] = field(default_factory=list)
    floor: dict[str, Any] = field(default_factory=dict)
    interrupted: BaseException | None = None


def take(
    hardware: Hardware,
    store: Path,
    *,
    stop_at: float,
    progress: Progress,
    engine_names: Sequence[str] = (),
    model: ReadResult | None = None,
    fresh: bool = False,
    programme: Programme = PROGRAMME,
) -> Taken:
    """Measure until everything is, or the time is up. Ctrl-C ends it: what was measured is kept and returned.

    Args:
        stop_at: on the monotonic clock.
        engine_names: those to measure; none: all that are installed.
        model: measured besides those made here.
        fresh: measure again what is known.

    Raises:
        BadInput: the given model's context is too short, or an engine is unknown; EnvironmentProblem: no engine can
            run here; OSError: nothing can be kept.
    """
    own = keeping.own_store(store)
    own.require_writable()
    names = _engines(engine_names)
    taken = Taken()
    with tempfile.TemporaryDirectory(prefix="leanplan-calibrate-") as home, Servers(extra_ops=WORK) as servers:
        taking = _Taking(programme, hardware, own, servers, Path(home), stop_at, progress, taken, fresh=fresh)
        try:
            for name in names:
                servers.warm(engines.get(name).ENGINE.preload)
            taking.go(names, model)
        except (KeyboardInterrupt, Terminated) as stop:
            taken.interrupted = stop
    return taken


class _Taking:
    def __init__(
        self, programme: Programme, hardware: Hardware, own: Any, servers: Servers, home: Path, stop_at: float, progress: Progress,
        taken: Taken, *, fresh: bool,
    ) -> None:  # fmt: skip
        self.programme, self.hardware, self.own, self.servers, self.home = programme, hardware, own, servers, home
        self.stop_at, self.progress, self.taken, self.fresh = stop_at, progress, taken, fresh
        self.models: dict[str, Model] = {}
        self.folders: dict[str, Path] = {}
        self.prompts: dict[str, Path] = {}
        self.spent: dict[str, list[float]] = {}
        self.tried = False

    def go(self, names: Sequence[str], given: ReadResult | None) -> None:
        if given is not None:
            assert given.folder is not None
            _check_length(given.model, self.programme.workload)
            self._add(GIVEN, given.model, given.folder)
        self._make(self.programme.smallest)
        self.taken.floor = self._floor()
        tasks = self._tasks(names)
        missed: dict[str, list[str]] = {}
        for number, task in enumerate(tasks):
            if (known := self._known(task)) is not None:
                self.taken.records.append(known)
                self.taken.known += 1
            elif self._time_for(task.size):
                self.progress.tick(f"{number + 1} of {len(tasks)}: {task}")
                self._one(task)
            else:
                missed.setdefault(f"{task.size} model", []).append(f"{task.engine} {task.form.name}")
        for size, formats in missed.items():
            self.taken.left_out.append(f"no time for the {size} in {', '.join(formats)}")

    # ------------------------------------------------------------ what to measure

    def _tasks(self, names: Sequence[str]) -> list[Task]:
        """Return everything worth measuring, the most telling first.

        The unchanged models on each engine: its floor and its speed. Then the larger models in one format of each width,
        engines taking turns, then in the others; last the formats of the smallest one.
        """
        smallest = self.programme.smallest
        larger = [*([GIVEN] if GIVEN in self.models else []), *reversed(list(self.programme.sizes)[1:])]
        made = {name: self._formats(name, self.models[smallest]) for name in names}
        formats = dict.fromkeys((smallest, *larger), made)
        if GIVEN in self.models:
            formats[GIVEN] = {name: self._formats(name, self.models[GIVEN]) for name in names}
        first = [task for size in (smallest, *larger) for name in names for task in _tasks(size, name, formats)[:1]]
        turns = {
            size: [t for turn in zip_longest(*(_tasks(size, name, formats)[1:] for name in names)) for t in turn if t]
            for size in (smallest, *larger)
        }
        later = [task for turn in zip_longest(*(turns[size] for size in larger)) for task in turn if task]
        return [*first, *later, *turns[smallest]]

    def _formats(self, name: str, model: Model) -> list[Format]:
        """Return every weight format one step reaches on an engine, the unchanged one first, then by `_by_width`.

        Of several steps to one format the one quickest to build. Compiling and calibrating techniques are left out: they
        take longer than a calibration should.
        """
        from cost_models.demand import chains
        from search.space import build_space

        load = self.programme.workload
        space = build_space(model, load, self.hardware, engine_names=[name], calibration=False)
        if name not in space.options:
            self.taken.left_out += [
                f"{r.what}: {r.why}" for r in space.refused if r.kind == "engine" and r.what == name
            ]
            return []
        steps = [step for family in space.options[name].values() for step in family]
        found: dict[tuple[str, str], tuple[tuple[int, float, str], Format]] = {}
        for chosen in ((), *((step,) for step in steps)):
            plan = space.plan(name, chosen)
            if plan is None:
                continue
            demand = chains(model, load).node(plan).demand
            key = (demand.weight_format, demand.compute_dtype)
            rank = (len(chosen), demand.build_flop, str(chosen))
            wanted = self.programme.formats is None or demand.weight_format in self.programme.formats
            if wanted and not demand.compiled and (key not in found or rank < found[key][0]):
                bits = 8 * demand.linear_bytes / demand.linear_params
                form = Format(
                    name=demand.weight_format, bits=bits, steps=plan.steps, needs_s=self._needs_s(plan, model)
                )
                found[key] = (rank, form)
        unchanged = [form for rank, form in found.values() if rank[0] == 0]
        return unchanged + _by_width([form for rank, form in found.values() if rank[0]])

    def _needs_s(self, plan: Plan, model: Model) -> float:
        """Return the seconds that a plan is told to need; inf where a rate is missing that tells them."""
        from cost_models.predict import estimate_many

        load = self.programme.workload
        try:
            told = estimate_many([plan], model, load, self.hardware)
            tokens = self.programme.protocol.requests * load.output_tokens
            return float((told["build_s"].mid + tokens * told["tpot_s"].mid)[0])
        except EnvironmentProblem:
            return math.inf

    # ------------------------------------------------------------ one measurement

    def _one(self, task: Task) -> None:
        began, self.tried = time.monotonic(), True
        try:
            record = self._measure(task)
        except CandidateFailed as error:
            self.taken.left_out.append(f"{task}: {error.kind}: {error.message}")
            return
        waited_s = record.measurement.protocol["lock_wait_s"]
        self.stop_at += waited_s  # for another measurement on this machine: not our time
        self.spent.setdefault(task.size, []).append(time.monotonic() - began - waited_s)
        self.own.put(record)
        self.taken.records.append(record)
        shown = ", ".join(
            f"{METRICS[name].label} {figure_text(record.measurement.figures[name], name)}"
            for name in ("tpot_s", "ttft_s")
        )
        self.progress.line(f"{task}: {shown}")

    def _measure(self, task: Task) -> Record:
        self._make(task.size)
        model = self.models[task.size]
        plan = Plan(model_digest=model.digest, engine=task.engine, steps=task.form.steps)
        out, log = self.home / "artefact", self.home / "log.txt"
        engine = engines.get(plan.engine)
        limits = self._limits()
        building.build(
            self.servers, plan, model, model_folder=self.folders[task.size], out=out, limits=limits,
            workspace=self.home / "build", log=log,
        )  # fmt: skip
        with self.servers.start(engine.ENGINE.preload, folder=self.home / "serve", limits=limits, log=log) as candidate:
            job = measuring.open_artefact(candidate, out, self.programme.workload, self.prompts[task.size])
            observed = measuring.screen(job, self.programme.protocol, self.hardware, waiting=self.progress.line)
        shutil.rmtree(self.home / "serve", ignore_errors=True)
        measurement = Measurement(
            plan=plan, key=self._key(task), hardware_fingerprint=self.hardware.fingerprint, figures=observed.figures,
            protocol=observed.protocol, versions=keeping.installed(plan.engine), warnings=observed.warnings,
            taken_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), sequence=len(self.taken.records),
        )  # fmt: skip
        return Record(measurement=measurement, model=model, workload=self.programme.workload)

    def _known(self, task: Task) -> Record | None:
        return None if self.fresh else self.own.get(self._key(task))

    def _key(self, task: Task) -> str:
        return measurement_key(
            model=self.models[GIVEN].digest if task.size == GIVEN else self.programme.sizes[task.size], engine=task.engine,
            steps=task.form.steps, workload=self.programme.workload, versions=keeping.installed(task.engine),
            machine=self.hardware.fingerprint, protocol=asdict(self.programme.protocol),
        )  # fmt: skip

    def _time_for(self, size: str) -> bool:
        if not self.taken.records and (not self.tried or time.monotonic() < self.stop_at):
            return True  # one at least, however slow the machine is: whoever waited this long gets it
        spent = self.spent.get(size)
        return time.monotonic() + (statistics.median(spent) if spent else FIRST_S) <= self.stop_at

    # ------------------------------------------------------------ models and the floor

    def _make(self, size: str) -> None:
        if size in self.models:
            return
        from planner.reading import read_model

        folder = self.home / size
        self.progress.tick(f"making a {size} model")
        self._ask("make_model", {"folder": str(folder), "settings": dict(self.programme.sizes[size])})
        self._add(size, read_model(str(folder)).model, folder)

    def _floor(self) -> dict[str, Any]:
        from planner.locks import measurement_lock

        with measurement_lock(waiting=self.progress.line) as waited_s:
            self.stop_at += waited_s
            return self._ask("launch_floor", {})["floor"]

    def _ask(self, op: str, payload: dict[str, Any]) -> dict[str, Any]:
        preload = building.builder_preload(())
        with self.servers.start(
            preload, folder=self.home / "work", limits=self._limits(), log=self.home / "log.txt"
        ) as candidate:
            return candidate.call(op, payload, timeout_s=LONGEST_S)

    def _add(self, size: str, model: Model, folder: Path) -> None:
        import random

        from planner.data import PROMPTS, save_windows

        self.models[size], self.folders[size] = model, folder
        draw = random.Random(0)
        rows = [
            [draw.randrange(model.vocab_size) for _ in range(self.programme.workload.prompt_tokens)]
            for _ in range(PROMPTS)
        ]
        self.prompts[size] = save_windows(self.home / f"{size}.npy", rows)

    def _limits(self) -> Limits:
        return Limits(memory_bytes=self.hardware.memory_limit_bytes, time_s=LONGEST_S, disk_bytes=DISK_BYTES)


def _engines(wanted: Sequence[str]) -> list[str]:
    """Return the engines to measure.

    Raises:
        BadInput: an unknown name; EnvironmentProblem: one that was asked for, or every one, cannot run here.
    """
    names = list(dict.fromkeys(wanted)) or list(engines.names())
    why = {name: reason for name in names if (reason := engines.get(name).find())}
    if missing := [name for name in why if wanted or len(why) == len(names)]:
        raise EnvironmentProblem(
            "; ".join(f"{name}: {why[name]}" for name in missing), hint="leanplan doctor shows what is missing",
            where="--engine" if wanted else "engines",
        )  # fmt: skip
    return [name for name in names if name not in why]


def _check_length(model: Model, workload: Workload) -> None:
    needed = workload.prompt_tokens + workload.output_tokens
    if model.max_context_tokens < needed:
        raise BadInput(
            f"context of {model.max_context_tokens} tokens is too short: {needed} are served", where="--model",
            hint="give a model with a longer context, or none: small ones are made for the purpose",
        )  # fmt: skip


def _tasks(size: str, name: str, formats: Mapping[str, Mapping[str, Sequence[Format]]]) -> list[Task]:
    return [Task(size=size, engine=name, form=form) for form in formats[size][name]]


def _off_usual(form: Format) -> float:
    return min(abs(math.log(form.bits / usual)) for usual in USUAL_BITS)


def _by_width(formats: Sequence[Format]) -> list[Format]:
    """Return the formats nearest to each of USUAL_BITS first, in that order, then their neighbours.

    Of formats about as near the one that is quickest to build and to serve comes first: the time is short.

    >>> [f.name for f in _by_width([Format(name=str(b), bits=b, steps=()) for b in (2.6, 3.4, 4.5, 5.5, 8.5, 16.0)])]
    ['4.5', '8.5', '16.0', '2.6', '5.5', '3.4']
    >>> [f.name for f in _by_width([Format(name=n, bits=4.5, steps=(), needs_s=s) for n, s in (("nf4", 9.0), ("int4", 3.0))])]
    ['int4', 'nf4']
    """
    places: dict[int, int] = {}
    ranked = []
    for form in sorted(formats, key=lambda f: (round(_off_usual(f), 1), f.needs_s)):
        width = min(range(len(USUAL_BITS)), key=lambda i: abs(math.log(form.bits / USUAL_BITS[i])))
        places[width] = places.get(width, 0) + 1
        ranked.append((places[width], width, form))
    return [form for _, _, form in sorted(ranked, key=lambda item: item[:2])]
