"""Predicted figures of plans: every cost term evaluated over columns of demands, corrected by what was measured."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cost_models.calibration import Calibration, Features
from cost_models.case import Case, case_of
from cost_models.demand import STEPS, Node, chains
from cost_models.terms import in_order, terms
from cost_models.terms._prediction import Prediction
from knowledge_base.errors import EnvironmentProblem
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

    @property
    def sd(self) -> np.ndarray:
        """Predictive standard deviation in the metric's own unit, (plans,)."""
        return (self.high - self.low) / (2 * Z)


class Figures(dict[str, Any]):
    """Predictions by metric name. One that a missing fact prevents is absent, and looking it up raises the reason."""

    def __init__(self) -> None:
        super().__init__()
        self.prevented: dict[str, EnvironmentProblem] = {}

    def __missing__(self, name: str) -> Any:
        raise self.prevented[name] if name in self.prevented else KeyError(name)


def estimate_many(
    plans: Sequence[Plan], model: Model, workload: Workload, hardware: Hardware, calibration: Calibration | None = None
) -> Figures:
    """Return metric name -> Estimates for all plans.

    Raises:
        EnvironmentProblem: the device lacks the rate of a dtype some plan computes with. A fact only one metric
            needs (power, for energy) leaves that metric out; looking it up raises the reason.
        BadInput: a step names an unknown technique.
    """
    memo = chains(model, workload)
    columns: dict[str, list[tuple[Any, Any, Any]]] = {}
    prevented: dict[str, EnvironmentProblem] = {}
    with _no_collection():
        for start in range(0, len(plans), CHUNK):
            nodes = [memo.node(plan) for plan in plans[start : start + CHUNK]]
            found = evaluate(case_of(nodes, workload, hardware), calibration, Features(nodes))
            prevented |= found.prevented
            for name, prediction in found.items():
                columns.setdefault(name, []).append(interval(terms.get(name), prediction))
    figures = Figures()
    figures.prevented = prevented
    for name, parts in columns.items():
        mid, low, high = (np.concatenate(part) for part in zip(*parts, strict=True))
        figures[name] = Estimates(mid=mid, low=low, high=high)
    return figures


def estimate(
    plan: Plan, model: Model, workload: Workload, hardware: Hardware, calibration: Calibration | None = None
) -> Estimate:
    """Return predicted values of one plan, each with its interval, source and reason.

    Raises:
        EnvironmentProblem: the device lacks the rate of the dtype the plan computes with.
        BadInput: a step names an unknown technique.
    """
    nodes = [chains(model, workload).node(plan)]
    raw = evaluate(case_of(nodes, workload, hardware), calibration, Features(nodes))
    values = {}
    for term in in_order():
        if term.QUANTITY in raw:
            prediction = raw[term.QUANTITY]
            mid, low, high = (float(np.broadcast_to(v, (1,))[0]) for v in interval(term, prediction))
            learned = calibration is not None and _knows(calibration, term)
            source = "calibrated" if learned else "published" if _learns(term) == "quality" else "analytic"
            values[term.QUANTITY] = Value(
                mid=mid, low=low, high=high, source=source, because=because(prediction, nodes[0], term)
            )
    return Estimate(plan_id=plan.id, hardware_name=hardware.name, values=values)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Hold the cyclic garbage collector still: thousands of new nodes, none of them garbage, set it off again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def evaluate(case: Case, calibration: Calibration | None, features: Features) -> Figures:
    """Return every term's Prediction; each term reads the corrected predictions of those it uses."""
    found = Figures()
    for term in in_order():
        raw = predict_term(term, case, found)
        if raw is not None:
            found[term.QUANTITY] = calibration.correct(term, raw, features) if calibration else raw
    return found


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
    """Return what dominates a value and what was assumed: `92 % weights, 6 % engine overhead`."""
    clauses = []
    whole = float(np.sum(prediction.mid))
    if prediction.parts and whole > 0:
        shares = sorted(((float(np.sum(v)) / whole, name) for name, v in prediction.parts.items()), reverse=True)
        clauses.append(", ".join(f"{share:.0%} {name}" for share, name in shares[:3] if share >= 0.05))
    if _learns(term) == "quality":
        clauses += [f"{STEPS[i]}: log ratio +/- {math.sqrt(variance):.2g}" for i, variance, _ in node.steps if variance]
        clauses = clauses or ["no step changes what the model computes"]
    if prediction.note:
        clauses.append(prediction.note)
    return "; ".join(clauses)


def _knows(calibration: Calibration, term: ModuleType) -> bool:
    """Return whether measurements corrected that term, or one it is made of."""
    return calibration.knows(term) or any(_knows(calibration, terms.get(name)) for name in term.USES)


def _learns(term: ModuleType) -> str:
    return getattr(term, "LEARNS", "machine")
