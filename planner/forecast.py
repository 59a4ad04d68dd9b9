"""What plans would cost before anything is run: behind the wizard's panel and `leanplan advise`.

Nothing here measures a plan or imports torch. A sample of the legal plans is priced once for each model, workload and
machine; budgets and objectives are then judged on the arrays, so that an answer follows every budget typed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.metrics import METRICS
from knowledge_base.types import Budget, Device, Estimate, Hardware, Model, Plan
from planner.foreseeing import BUILD_SHARE, Experience, experience, foresee
from planner.results import PlanResult, Rejection
from planner.room import room
from planner.run_forecast import RunForecast

if TYPE_CHECKING:
    import numpy as np

    from planner.machine import Profile
    from planner.reading import ReadResult
    from planner.spec import Spec
    from search.problem import Priced, Problem
    from search.space import Space

EXHAUSTIVE_PLANS = 3_000  # spaces up to this many combinations are priced whole
ROUNDS = 3  # steps added to the best plans of larger ones, one for each round
LOSSES = (0.0, 0.01, 0.02, 0.05, 0.1, float("inf"))  # a sample holds the best plans within each loss of quality
QUICK_S = 0.12  # what measuring one rate of a machine may take when there is no profile of it


# ---------------------------------------------------------------- the machine, as far as it is known


def known_machine(name: str, store: Path) -> tuple[Hardware, str | None]:
    """Return a machine and a note on it, without the seconds a whole probe takes.

    Raises:
        BadInput: no such machine; EnvironmentProblem: it cannot be told without measuring.
    """
    from planner import machine
    from planner.calibrating.keeping import laid_on

    if name != "local":
        return machine.find(name, store), None
    light = {probe: machine.probes.get(probe).find() for probe in machine.LIGHT}
    mark = machine.fingerprint(light)
    profile = Path(store) / "machines" / f"{mark}.json"
    if (known := machine.read_profile(profile)) is not None:
        return laid_on(known.hardware, store), None
    from planner.probes.accelerators import names

    if gpus := names():
        raise EnvironmentProblem(
            f"{gpus[0]} was not measured yet, so nothing can be predicted for it",
            hint="leanplan probe measures this machine in half a minute; so does `probe` on the wizard's third screen",
            where="hardware",
        )  # fmt: skip
    return _quick_look(light, mark), "two rates of this machine were glanced at; leanplan probe measures them all"


def _quick_look(facts: dict[str, Any], mark: str) -> Hardware:
    """Return this machine by two rates numpy can measure in a moment: reading memory, multiplying in float32.

    The other types are taken to be no faster than float32, which is true of the slowest processors only.
    """
    import numpy as np

    cpu, memory = facts["linux_cpu"], facts["memory_limits"]
    array = np.ones(min(2**26, memory["available_bytes"] // 16), dtype=np.float32)
    matrix = np.ones((512, 1024), dtype=np.float32)
    read_s, multiply_s = _least_s(lambda: array @ array), _least_s(lambda: matrix @ matrix.T)
    rate = 2.0 * 512 * 512 * 1024 / multiply_s
    processor = Device(
        name=cpu["name"], kind="cpu", memory_bytes=memory["limit_bytes"], memory_bytes_per_s=array.nbytes / read_s,
        flop_per_s=dict.fromkeys(("float32", "bfloat16", "float16", "int8"), rate), cores=cpu["cores"],
        features=frozenset(cpu["features"]), source="a quick look with numpy, not a probe",
    )  # fmt: skip
    return Hardware(
        name="local", devices=(processor,), host_memory_bytes=memory["host_bytes"], memory_limit_bytes=memory["limit_bytes"],
        energy_counters=tuple(facts["energy_counters"]["kinds"]), fingerprint=mark,
    )  # fmt: skip


def _least_s(work: Callable[[], object]) -> float:
    """Return the least seconds `work` takes: noise only slows."""
    best, stop = float("inf"), time.monotonic() + QUICK_S
    while time.monotonic() < stop or best == float("inf"):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


# ---------------------------------------------------------------- the outlook


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The best figure of one metric among plans that keep to every other budget."""

    value: float
    low: float
    high: float
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is predicted for a spec: plans with their prices, judged by its budgets."""

    spec: Spec
    model: Model
    hardware: Hardware
    space: Space
    refused: tuple[Rejection, ...]
    model_notes: tuple[str, ...]
    machine_notes: tuple[str, ...]
    weights_here: bool  # without weights a model can be priced, not run
    priced: Priced  # the sample, under the spec's budgets and objectives
    unchanged: Estimate
    learned: Experience = field(default_factory=Experience)  # what earlier runs here took

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth telling of the model and the machine."""
        return (*self.model_notes, *self.machine_notes)

    @property
    def memory_bytes(self) -> int:
        """What a plan may use: the machine's limit, or the spec's where that is lower."""
        return min(self.hardware.memory_limit_bytes, self.spec.limits.memory_bytes or self.hardware.memory_limit_bytes)

    def within(self, budgets: Sequence[Budget] | None = None) -> np.ndarray:
        """Return (plans,) booleans: predicted to fit the memory, to be built in time, and to keep these error budgets.

        Args:
            budgets: None: all of the spec's.
        """
        import numpy as np

        fits = np.asarray(self.priced.figures["peak_memory_bytes"].mid <= self.memory_bytes)
        if self.spec.hardware == "local":  # elsewhere nothing is built, so nothing takes too long to build
            fits = fits & (self.priced.figures["build_s"].mid <= BUILD_SHARE * self.spec.search.time_limit_s)
        for budget in self.binding if budgets is None else budgets:
            fits = fits & (np.asarray(self.priced.violation(budget)) <= 0)
        return fits

    @property
    def binding(self) -> list[Budget]:
        """The error budgets that can be predicted."""
        return [b for b in self.spec.budgets if b.level == "error" and b.metric in self.priced.figures]

    @property
    def impossible(self) -> list[Budget]:
        """The error budgets that no plan keeps, even alone."""
        return [b for b in self.binding if not self.within([b]).any()]

    @property
    def best(self) -> Plan | None:
        """The plan that would be recommended: within all limits, best by the objectives in their order."""
        import numpy as np

        from planner.answering import TIE

        left = np.flatnonzero(self.within())
        if not len(left):
            return None
        costs = self.priced.costs()
        for column in range(costs.shape[1]):
            values = costs[left, column]
            left = left[values <= values.min() + TIE * abs(values.min())]
        return self.priced.plans[int(left[0])]

    @property
    def run(self) -> RunForecast:
        """What measuring here would take, by uncorrected predictions: at once."""
        return foresee(self.spec, self.priced, self.learned, probed=self.hardware.measured)

    def estimate(self, plan: Plan) -> Estimate:
        """Return one plan's predicted values, each with its reason."""
        import cost_models

        return cost_models.estimate(plan, self.model, self.spec.workload, self.hardware)

    def reach(self, metric: str) -> Reach | None:
        """Return how far a metric can go while every other budget holds that can hold at all.

        None where those contradict each other, or the metric cannot be predicted.
        """
        import numpy as np

        hopeless = self.impossible
        left = np.flatnonzero(self.within([b for b in self.binding if b.metric != metric and b not in hopeless]))
        if metric not in self.priced.figures or not len(left):
            return None
        values = self.priced.figures[metric]
        sign = 1 if METRICS[metric].better == "lower" else -1
        index = int(left[np.argmin(sign * values.mid[left])])
        return Reach(
            value=float(values.mid[index]), low=float(values.low[index]), high=float(values.high[index]),
            plan=self.priced.plans[index],
        )  # fmt: skip

    def tightest(self, budget: Budget) -> str | None:
        """Return the tightest limit some plan is predicted to keep beside the others, as one would write it."""
        found = self.reach(budget.metric)
        return None if found is None else _limit_text(found.value, METRICS[budget.metric])

    def limit(self, budget: Budget) -> float | None:
        """Return a budget's limit in SI units; relative ones by the predicted unchanged model."""
        from search.limits import limit_of

        return limit_of(budget, {name: value.mid for name, value in self.unchanged.values.items()})

    def contradictions(self) -> list[Budget]:
        """Return the error budgets to blame when no plan keeps all: those no plan keeps, else those that clash."""
        if self.within().any():
            return []
        clashing = [b for b in self.binding if self.within([o for o in self.binding if o.metric != b.metric]).any()]
        return self.impossible or clashing or self.binding


def _limit_text(value: float, metric: Any) -> str:
    """Return a figure of two digits that `value` keeps to: rounded up for a max, down for a min."""
    sign = 1 if metric.better == "lower" else -1
    for bump in (0.0, 0.005, 0.01, 0.02, 0.05, 0.1):
        text = units.format(value * (1 + sign * bump), metric.dimension, digits=2)
        if value == 0 or sign * (units.parse(text, metric.dimension, field=metric.label) - value) >= 0:
            return text
    return units.exact(value, metric.dimension)


def as_result(outlook: Outlook, plan: Plan) -> PlanResult:
    """Return a plan as a result: its estimate, judged by the spec's budgets."""
    from planner.judging import judge

    estimate = outlook.estimate(plan)
    reference = {name: value.mid for name, value in outlook.unchanged.values.items()}
    verdicts = judge(outlook.spec.budgets, baseline=reference, estimate=estimate)
    return PlanResult(plan=plan, estimate=estimate, verdicts=verdicts)


# ---------------------------------------------------------------- making one


@dataclass(slots=True)
class Forecast:
    """Makes outlooks, and remembers what it read: the same model, machine and sample are not looked at twice."""

    store: Path
    offline: bool = False
    trust_remote_code: str | None = None
    allow_pickle: bool = False
    _models: dict[Any, ReadResult] = field(default_factory=dict)
    _machines: dict[str, tuple[Hardware, str | None]] = field(default_factory=dict)
    _learned: dict[Any, Experience] = field(default_factory=dict)
    _samples: dict[Any, tuple[Space, tuple[Rejection, ...], Priced]] = field(default_factory=dict)

    def model(self, spec: Spec) -> ReadResult:
        """Return the facts of a spec's model; config.json is enough.

        Raises:
            LeanplanError: it cannot be read, or the hub cannot be reached.
        """
        from planner.preparing import read_models, source_of

        key = (source_of(spec, spec.model), spec.model.revision, spec.draft)
        if key not in self._models:
            self._models[key] = read_models(
                spec, offline=self.offline, trust_remote_code=self.trust_remote_code, allow_pickle=self.allow_pickle,
                weights="optional",
            )  # fmt: skip
        return self._models[key]

    def machine(self, name: str) -> tuple[Hardware, str | None]:
        """Return a machine and a note on it; see known_machine."""
        if name not in self._machines:
            self._machines[name] = known_machine(name, self.store)
        return self._machines[name]

    def probe(self, tell: Callable[[str], None]) -> Profile:
        """Measure this machine, keep its profile, and price by it from now on."""
        from planner import machine

        found = machine.profile(self.store, tell=tell)
        self._machines["local"] = found.hardware, None
        return found

    def outlook(self, spec: Spec) -> Outlook:
        """Return what is predicted for a spec.

        Raises:
            LeanplanError: the model, the machine or the workload cannot be used.
        """
        import cost_models
        from planner.preparing import check_lengths, with_prices

        read = self.model(spec)
        found, note = self.machine(spec.hardware)
        hardware = with_prices(found, spec)
        check_lengths(spec, read.model)
        space, refused, sampled = self._sample(spec, read.model, hardware)
        problem = replace(sampled.problem, budgets=spec.budgets, objectives=spec.objectives)
        unchanged = cost_models.estimate(space.unchanged(), read.model, spec.workload, hardware)
        return Outlook(
            spec=spec, model=read.model, hardware=hardware, space=space, refused=refused,
            model_notes=tuple(read.notes), machine_notes=(note,) if note else (), weights_here=read.folder is not None,
            priced=replace(sampled, problem=problem), unchanged=unchanged, learned=self._experience(spec, read.model, hardware),
        )  # fmt: skip

    def run(self, spec: Spec, run_root: Path, *, fresh: bool = False) -> RunForecast:
        """Return what a measured run of a spec would take, and what stands in its way; nothing is run.

        Raises:
            BadInput: the spec is not for this machine; LeanplanError: as `outlook`.
        """
        from planner.downloading import Download
        from planner.predicting import learned
        from planner.store import Store

        if spec.hardware != "local":
            raise BadInput(
                f"nothing would be run: {spec.hardware} is another machine", where="hardware",
                hint="leanplan plan --predict prices the plans there in seconds",
            )  # fmt: skip
        missing = Download.of(spec, offline=self.offline, allow_pickle=self.allow_pickle).missing_bytes
        outlook = self.outlook(spec)
        model, hardware = outlook.model, outlook.hardware
        calibration = learned(Store(self.store).records(hardware.fingerprint), model, spec.workload, hardware)
        problem = replace(outlook.priced.problem, calibration=calibration)
        there, some = room(spec, model, hardware.memory_limit_bytes, run_root), sample(problem)
        fitting = there.fitting(some)
        forecast = foresee(
            spec,
            fitting if fitting.plans else some,
            outlook.learned,
            probed=hardware.measured,
            download_bytes=missing,
            fresh=fresh,
        )
        return replace(forecast, obstacles=there.obstacles(spec, problem.price([outlook.space.unchanged()]), missing))

    def _experience(self, spec: Spec, model: Model, hardware: Hardware) -> Experience:
        from planner.store import Store

        key = (hardware.fingerprint, spec.search.effort, model.digest, spec.workload)
        if key not in self._learned:
            self._learned[key] = experience(Store(self.store), hardware.fingerprint, spec, model.digest)
        return self._learned[key]

    def _sample(self, spec: Spec, model: Model, hardware: Hardware) -> tuple[Space, tuple[Rejection, ...], Priced]:
        from planner.preparing import legal_plans
        from search.problem import Problem

        key = (
            model.digest, spec.workload, repr(hardware), spec.engines, spec.techniques, spec.calibration is not None,
            spec.limits.memory_bytes, spec.search.effort,
        )  # fmt: skip
        if key not in self._samples:
            space, refused = legal_plans(spec, model, hardware, predict=spec.hardware != "local")
            problem = Problem(
                model=model,
                workload=spec.workload,
                hardware=hardware,
                space=space,
                budgets=(),
                objectives=spec.objectives,
            )
            self._samples[key] = space, refused, sample(problem)
        return self._samples[key]


def sample(problem: Problem) -> Priced:
    """Return legal plans with prices: all of a small space; of a large one those that are best at something.

    Every plan of one step is in it, and, round by round, every plan one step longer than the best so far by some
    metric within some loss of quality. Deterministic, and independent of budgets.
    """
    space = problem.space
    if space.count() <= EXHAUSTIVE_PLANS:
        return problem.price(list(space.each()))
    fresh = [plan for engine in space.options if (plan := space.plan(engine, ())) is not None]
    plans = dict.fromkeys(fresh)
    for _ in range(ROUNDS + 1):
        fresh = [longer for plan in fresh for longer in _longer(space, plan) if longer not in plans]
        plans |= dict.fromkeys(fresh)
        priced = problem.price(list(plans))
        fresh = _champions(priced)
    return priced


def _longer(space: Space, plan: Plan) -> Iterator[Plan]:
    for steps in space.options[plan.engine].values():
        for step in steps:
            if (longer := space.plan(plan.engine, (*plan.steps, step))) is not None:
                yield longer


def _champions(priced: Priced) -> list[Plan]:
    """Return the plans that are best by some metric within some loss of quality, on each engine."""
    import numpy as np

    loss = priced.figures["quality_loss_ratio"].mid
    engines = np.array([plan.engine for plan in priced.plans])
    chosen: dict[Plan, None] = {}
    for engine in dict.fromkeys(engines):
        for most in LOSSES:
            left = np.flatnonzero((engines == engine) & (loss <= most))
            for name, values in priced.figures.items():
                if len(left):
                    sign = 1 if METRICS[name].better == "lower" else -1
                    chosen[priced.plans[int(left[np.argmin(sign * values.mid[left])])]] = None
    return list(chosen)
