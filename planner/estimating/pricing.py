"""One plan priced on one machine, with the parts its figures are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_base.metrics import METRICS
from knowledge_base.types import Estimate, Plan, Value
from planner.estimating.asking import Asked

if TYPE_CHECKING:
    from cost_models.case import Case
    from cost_models.predict import Figures
    from cost_models.queueing import Queue
    from cost_models.served import Served
    from knowledge_base.errors import EnvironmentProblem
    from knowledge_base.types import Demand, Hardware

PEAK = "peak_memory_bytes"
SIZES = ("memory", "network", "quality")  # resources whose figures need no run


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """What is predicted of a plan, and why the rest is not."""

    asked: Asked
    plan: Plan
    estimate: Estimate
    prevented: Mapping[str, EnvironmentProblem]
    limit_bytes: float  # memory there is for what `PEAK` is of
    coverage: float  # of the intervals
    notes: tuple[str, ...]

    @property
    def values(self) -> Mapping[str, Value]:
        return self.estimate.values

    @property
    def fits(self) -> bool:
        """Whether predicted peak memory is within the machine's limit."""
        return self.values[PEAK].mid <= self.limit_bytes

    @property
    def holding(self) -> dict[str, Value]:
        """The figures that hold: all where the plan fits, else its sizes and quality, for nothing would run."""
        return {n: v for n, v in self.values.items() if self.fits or METRICS[n].resource in SIZES}


@dataclass(frozen=True, slots=True, kw_only=True)
class ByOperators(Priced):
    """Priced operator by operator. `case` and `figures` are what the terms saw and said, as columns of one plan."""

    demand: Demand
    case: Case
    figures: Figures
    queue: Queue


@dataclass(frozen=True, slots=True, kw_only=True)
class ByLaw(Priced):
    """Priced by the law of an engine that Leanplan cannot run."""

    served: Served


def price(asked: Asked) -> Priced:
    """Return the predictions of a plan that `check` let pass.

    Raises:
        EnvironmentProblem: the device lacks the rate of the dtype the plan computes with.
        BadInput: the model cannot be split over the devices.
    """
    return _by_law(asked) if asked.by_law else _by_operators(asked)


def _by_operators(asked: Asked) -> ByOperators:
    from cost_models.calibration import Features
    from cost_models.case import case_of
    from cost_models.demand import chains
    from cost_models.load import copies, leave_out_unstable, under_load
    from cost_models.predict import COVERAGE, evaluate, values_of

    node = chains(asked.model, asked.workload).node(asked.plan)
    features = Features([node])
    served, figures, queue = under_load(
        case_of([node], asked.workload, asked.hardware), lambda case: evaluate(case, None, features)
    )
    leave_out_unstable(figures, queue, asked.workload.requests_per_s)
    count = copies(asked.hardware)
    notes = _idle(asked.hardware)
    notes += [f"each of {count} devices holds a copy of the model; memory is of one"] if count > 1 else []
    notes += _capacity(asked, figures, queue)
    plan, device = asked.plan, asked.hardware.device
    limit = asked.hardware.memory_limit_bytes if device.kind == "cpu" else device.memory_bytes
    return ByOperators(
        asked=asked, plan=plan, demand=node.demand, case=served, figures=figures, queue=queue,
        estimate=Estimate(plan_id=plan.id, hardware_name=asked.hardware.name, values=values_of(figures, node)),
        prevented=figures.prevented, limit_bytes=limit, coverage=COVERAGE, notes=tuple(notes),
    )  # fmt: skip


def _capacity(asked: Asked, figures: Figures, queue: Queue) -> list[str]:
    """Return what there is to say of arriving requests beside how many the plan could answer."""
    import numpy as np

    from cost_models.predict import Z
    from knowledge_base import units

    if asked.workload.requests_per_s is None or np.all(queue.utilisation >= 1):
        return []
    capacity = float(np.max(queue.capacity_per_s))
    one = figures["tpot_s" if "tpot_s" in figures else "ttft_s"]
    least = capacity * float(np.exp(-Z * np.max(one.log_sd)))
    most, fewest = (units.format(x, "requests") for x in (capacity, least))
    risk = ", so it may fall behind" if least <= asked.workload.requests_per_s else ""
    return [f"capacity is {most}, at least {fewest}{risk}"]


def _idle(hardware: Hardware) -> list[str]:
    """Return what there is to say of accelerators unlike the one the plan runs on."""
    device = hardware.device
    others = dict.fromkeys(d.name for d in hardware.devices if d.kind == device.kind and d != device)
    return [f"runs on {device.name}; {', '.join(others)} stays idle: a plan is split over equal devices alone"] if others else []  # fmt: skip


def _by_law(asked: Asked) -> ByLaw:
    from cost_models.served import COVERAGE, families, serve

    served = serve(asked.engine, asked.model, asked.workload, asked.hardware, weights=asked.weights)
    told = (
        f"predicted from the law of {asked.engine}, fitted to {families()[asked.engine]:,} published rows; "
        f"{_runs(asked.engine)}"
    )
    return ByLaw(
        asked=asked, plan=asked.plan, served=served, prevented=served.prevented, limit_bytes=served.limit_bytes,
        estimate=Estimate(plan_id=asked.plan.id, hardware_name=asked.hardware.name, values=served.values),
        coverage=COVERAGE, notes=(told, *_idle(asked.hardware), *served.notes),
    )  # fmt: skip


def _runs(engine: str) -> str:
    from knowledge_base.registry import engines

    if engine in engines.names():
        return "Leanplan runs it in an environment of its own: leanplan ls engines"
    return "Leanplan cannot run this engine yet"


def does_not_fit(priced: Priced) -> str:
    """Return the beginning of a sentence on a plan that needs more memory than there is."""
    from knowledge_base import units

    peak, limit = (units.format(v, "bytes") for v in (priced.values[PEAK].mid, priced.limit_bytes))
    batch = priced.plan.step("batch_size")
    if batch is None or not isinstance(priced, ByOperators):
        return f"does not fit: peak memory {peak} of {limit}"
    largest = _largest_batch(priced, batch.knobs["count"])
    fits = f"the largest that fits is {largest}" if largest else "not even one request fits"
    return f"does not fit: a batch of {batch.knobs['count']} needs {peak}, there are {limit}; {fits}"


def _largest_batch(priced: ByOperators, count: int) -> int:
    """Return the most requests below `count` whose memory there is; 0 where there is none."""
    import numpy as np

    from cost_models.load import with_batch
    from cost_models.roofline import memory_parts

    def needs(batch: int) -> float:
        parts = memory_parts(with_batch(priced.case, np.array([float(batch)])))
        return float(np.sum(sum(parts.values())))

    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= priced.limit_bytes else (low, middle)
    return low
