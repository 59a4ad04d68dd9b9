"""Predicted figures of plans: every cost term evaluated over columns of demands, corrected by what was measured."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cost_models.calibration import Calibration, Features
from cost_models.case import Case, case_of
from cost_models.demand import STEPS, Node, chains
from cost_models.load import leave_out_unstable, under_load
from cost_models.queueing import Queue
from cost_models.terms import in_order, terms
from cost_models.terms._prediction import Prediction
from knowledge_base.errors import EnvironmentProblem
from knowledge_base.metrics import METRICS
from knowledge_base.types import Estimate, Hardware, Model, Plan, Value, Workload

CHUNK = 2048  # plans evaluated together: their columns stay in the processor's cache
COVERAGE = 0.8
# Standard deviations either side that hold COVERAGE: of Student's t with 4 degrees of freedom, not of the normal
# distribution, for the standard deviations are themselves known no better than from a handful of observations.
DEGREES = 4
Z = 1.5332062740589438


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """Predictions of one metric for many plans: arrays of shape (plans,). The interval is the central 80 %."""

    mid: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p95: np.ndarray | None = None  # over requests, where waiting makes them differ

    @property
    def sd(self) -> np.ndarray:
        """Predictive standard deviation in the metric's own unit, (plans,)."""
        return (self.high - self.low) / (2 * Z)


class Figures(dict[str, Any]):
    """Predictions by metric name. One that a missing fact prevents is absent, and looking it up raises the reason."""

    def __init__(self) -> None:
        super().__init__()
        self.prevented: dict[str, EnvironmentProblem] = {}
        self.calibrated: frozenset[str] = frozenset()  # metrics that rest on rates measured on the device

    def __missing__(self, name: str) -> Any:
        raise self.prevented[name] if name in self.prevented else KeyError(name)


def estimate_many(
    plans: Sequence[Plan],
    model: Model,
    workload: Workload,
    hardware: Hardware,
    calibration: Calibration | None = None,
) -> Figures:
    """Return metric name -> Estimates for all plans.

    Of one batch after the other, which is what is measured; where requests arrive or follow each other
    (`workload.loaded`), as they meet the plan, waiting included. Times of plans that would fall behind are infinite.

    Raises:
        EnvironmentProblem: the device lacks the rate of a dtype some plan computes with. A fact only one metric
            needs (power, for energy) leaves that metric out; looking it up raises the reason.
        BadInput: a step names an unknown technique.
    """
    memo = chains(model, workload)
    columns: dict[str, list[tuple[Any, ...]]] = {}
    prevented: dict[str, EnvironmentProblem] = {}
    with _no_collection() if len(plans) > CHUNK // 4 else contextlib.nullcontext():
        for start in range(0, len(plans), CHUNK):
            nodes = [memo.node(plan) for plan in plans[start : start + CHUNK]]
            case, features = case_of(nodes, workload, hardware), Features(nodes)
            found, _ = _as_met(case, calibration, features)
            prevented |= found.prevented
            for name, prediction in found.items():
                ends = interval(terms.get(name), prediction)
                columns.setdefault(name, []).append(ends if prediction.p95 is None else (*ends, prediction.p95))
    figures = Figures()
    figures.prevented = prevented
    for name, parts in columns.items():
        mid, low, high, *rest = (np.concatenate(part) for part in zip(*parts, strict=True))
        figures[name] = Estimates(mid=mid, low=low, high=high, p95=rest[0] if rest else None)
    return figures


def estimate(
    plan: Plan, model: Model, workload: Workload, hardware: Hardware, calibration: Calibration | None = None
) -> Estimate:
    """Return predicted values of one plan, each with its interval, source and reason.

    Raises:
        EnvironmentProblem: the device lacks the rate of the dtype the plan computes with.
        BadInput: a step names an unknown technique.
    """
    node = chains(model, workload).node(plan)
    found, queue = _as_met(case_of([node], workload, hardware), calibration, Features([node]))
    if queue is not None:
        leave_out_unstable(found, queue, workload.requests_per_s)
    return Estimate(plan_id=plan.id, hardware_name=hardware.name, values=values_of(found, node, calibration))


def values_of(found: Figures, node: Node, calibration: Calibration | None = None) -> dict[str, Value]:
    """Return one plan's predictions as values with their intervals, sources and reasons."""
    known = found.calibrated | set(calibration.corrections if calibration else ())
    values = {}
    for term in in_order():
        if term.QUANTITY in found:
            prediction = found[term.QUANTITY]
            mid, low, high = (_one(v) for v in interval(term, prediction))
            learned = _knows(known, term)
            source = "calibrated" if learned else "published" if _learns(term) == "quality" else "analytic"
            p95 = None if prediction.p95 is None else _one(prediction.p95)
            values[term.QUANTITY] = Value(
                mid=mid, low=low, high=high, source=source, because=because(prediction, node, term), p95=p95
            )
    return values


def _one(values: Any) -> float:
    return float(np.broadcast_to(values, (1,))[0])


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Hold the cyclic garbage collector still: thousands of new nodes, none of them garbage, set it off again and again.

    What was made meanwhile counts as old afterwards, or the next allocation would have all of it searched.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def evaluate(case: Case, calibration: Calibration | None, features: Features) -> Figures:
    """Return every term's Prediction; each term reads the corrected predictions of those it uses."""
    found = Figures()
    found.calibrated = case.calibrated
    for term in in_order():
        raw = predict_term(term, case, found)
        if raw is not None:
            found[term.QUANTITY] = calibration.correct(term, raw, features) if calibration else raw
    return found


def _as_met(case: Case, calibration: Calibration | None, features: Features) -> tuple[Figures, Queue | None]:
    """Return every term's Prediction, and the queue of requests where there is one."""
    if not case.workload.loaded:
        return evaluate(case, calibration, features), None
    _, found, queue = under_load(case, lambda at: evaluate(at, calibration, features))
    return found, queue


def predict_term(term: ModuleType, case: Case, found: Figures) -> Prediction | None:
    """Return one term's uncorrected Prediction; None, with the reason kept in `found`, where a fact is missing."""
    try:
        return term.predict(case, found)
    except EnvironmentProblem as problem:
        found.prevented[term.QUANTITY] = problem
        return None


def interval(term: ModuleType, prediction: Prediction) -> tuple[Any, Any, Any]:
    """Return (mid, low, high): the central 80 % where log(SHIFT + value) is normal."""
    shift = getattr(term, "SHIFT", 0.0)
    spread = np.exp(Z * prediction.log_sd)
    mid = prediction.mid + np.zeros_like(spread)
    return mid, (mid + shift) / spread - shift, (mid + shift) * spread - shift


def because(prediction: Prediction, node: Node, term: ModuleType) -> str:
    """Return what dominates a value, or what it follows from, and what was assumed: `92 % weights, 6 % engine overhead`."""
    clauses = []
    whole = float(np.sum(prediction.mid))
    if prediction.parts and whole > 0:
        shares = sorted(((float(np.sum(v)) / whole, name) for name, v in prediction.parts.items()), reverse=True)
        clauses.append(", ".join(f"{share:.0%} {name}" for share, name in shares[:3] if share >= 0.05))
    elif term.USES:
        clauses.append(f"follows {' and '.join(METRICS[name].label for name in term.USES)}")
    if _learns(term) == "quality":
        clauses += [f"{STEPS[i]}: log ratio +/- {math.sqrt(variance):.2g}" for i, variance, _ in node.steps if variance]
        clauses = clauses or ["no step changes what the model computes"]
    if prediction.note:
        clauses.append(prediction.note)
    return "; ".join(clauses) or "counted from the model's shape"


def _knows(known: Collection[str], term: ModuleType) -> bool:
    """Return whether measurements corrected that term, or one it is made of."""
    return term.QUANTITY in known or any(_knows(known, terms.get(name)) for name in term.USES)


def _learns(term: ModuleType) -> str:
    return getattr(term, "LEARNS", "machine")
