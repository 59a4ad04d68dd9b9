"""Corrections learned from measurements: plain numbers, saved as JSON, applied without scikit-learn.

The error of a prediction, in log space, is a sum of effects: of the machine (all plans), the model, the engine, the
engine with its weight format, each technique, and each technique's setting. Before any measurement every effect is 0
with a standard deviation that is a share of the prediction's own uncertainty, so the interval is the prior's; what a
step brings with it (the loss of quality, the acceptance of drafts) is that step's effect alone, and a step that changes
nothing of what serving costs has no effect on it. Each measurement sharpens the effects it took part in; plans that share
none of them keep wide intervals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from cost_models.demand import STEPS, Node
from cost_models.terms._prediction import Prediction

# Shares of the prior variance. Common effects scale with the metric's typical uncertainty, the others with the plan's.
SHARES = {"machine": 0.35, "model": 0.10, "engine": 0.20, "format": 0.25, "technique": 0.15, "setting": 0.08}
COMMON = ("machine", "model", "engine")
SMALLEST = 0.05  # share of a predicted loss: what is measured of less is noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """Which effects plans take part in: one entry for each (plan, effect) pair, arrays of shape (pairs,)."""

    plans: int
    rows: np.ndarray  # plan of each pair
    ids: np.ndarray  # effect of each pair, an index of _NAMES
    shares: np.ndarray  # its share of the variance that is the machine's and engine's
    own: np.ndarray  # its share of the variance that the plan's steps bring with them

    def take(self, indices: Sequence[int]) -> Effects:
        """Return the effects of some plans, renumbered from 0."""
        pairs = [np.flatnonzero(self.rows == i) for i in indices]
        rows = np.repeat(np.arange(len(indices)), [len(p) for p in pairs])
        chosen = np.concatenate(pairs) if pairs else np.array([], dtype=int)
        return Effects(
            plans=len(indices), rows=rows, ids=self.ids[chosen], shares=self.shares[chosen], own=self.own[chosen]
        )

    def names(self) -> tuple[str, ...]:
        """Return the names of all effects some plan takes part in, sorted."""
        return tuple(sorted(_NAMES[i] for i in np.unique(self.ids)))


class Features:
    """The effects of some plans, worked out when a term asks for them."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self._kinds: dict[str, Effects] = {}

    def of(self, term: ModuleType) -> Effects:
        """Return the effects that term learns about."""
        kind = getattr(term, "LEARNS", "machine")
        if kind not in self._kinds:
            self._kinds[kind] = self._steps("variance") if kind == "quality" else self._common_and_steps(kind)
        return self._kinds[kind]

    def _common_and_steps(self, kind: str) -> Effects:
        steps = self._steps("gain")
        flags = itertools.chain.from_iterable(n.served for n in self.nodes)
        counts = np.ones(len(steps.rows) // 2) if kind == "build" else np.fromiter(flags, dtype=float)
        codes: dict[tuple[Any, ...], int] = {}
        index = np.array([codes.setdefault((n.demand.model.digest, *n.key), len(codes)) for n in self.nodes], dtype=int)
        ids = np.array([_common_numbers(*key) for key in codes], dtype=int).reshape(-1, len(_COMMON_SHARES))
        plans = len(self.nodes)
        return Effects(
            plans=plans,
            rows=np.concatenate([np.repeat(np.arange(plans), len(_COMMON_SHARES)), steps.rows]),
            ids=np.concatenate([ids[index].ravel(), steps.ids]),
            shares=np.concatenate([np.tile(_COMMON_SHARES, plans), np.outer(counts, _STEP_SHARES).ravel()]),
            own=np.concatenate([np.zeros(plans * len(_COMMON_SHARES)), steps.own]),
        )

    def _steps(self, weight: str) -> Effects:
        """Return two effects for each step of each plan, its technique's and its setting's."""
        flat = itertools.chain.from_iterable
        table = np.fromiter(flat(flat(n.steps for n in self.nodes)), dtype=float).reshape(-1, 3)
        rows = np.repeat(np.arange(len(self.nodes)), [len(n.steps) for n in self.nodes])
        weights = table[:, {"variance": 1, "gain": 2}[weight]]
        whole = np.bincount(rows, weights=weights, minlength=len(self.nodes))[rows]
        share = np.divide(weights, whole, out=np.zeros_like(weights), where=whole > 0)
        return Effects(
            plans=len(self.nodes),
            rows=np.repeat(rows, 2),
            ids=_step_numbers()[table[:, 0].astype(int)].ravel(),
            shares=np.zeros(2 * len(rows)),
            own=np.outer(share, _OWN_SHARES).ravel(),
        )


# Effects by number, for speed: the numbers never leave the process.
_NAMES: list[str] = []
_IDS: dict[str, int] = {}
_COMMON: list[bool] = []
_STEP_IDS: list[tuple[int, int]] = []  # of demand.STEPS: (technique, setting)


def _number(name: str) -> int:
    if name not in _IDS:
        _IDS[name] = len(_NAMES)
        _NAMES.append(name)
        _COMMON.append(name.startswith(COMMON))
    return _IDS[name]


def _step_numbers() -> np.ndarray:
    """Return (steps seen, 2): the effects of each, its technique's and its setting's."""
    for step in STEPS[len(_STEP_IDS) :]:
        _STEP_IDS.append((_number(f"technique:{step.technique}"), _number(f"setting:{step}")))
    return np.array(_STEP_IDS, dtype=int).reshape(-1, 2)


_COMMON_SHARES = tuple(SHARES[kind] for kind in ("machine", "model", "engine", "format"))
_STEP_SHARES = (SHARES["technique"], SHARES["setting"])
_OWN_SHARES = (0.7, 0.3)  # of what a step brings: its technique's, its setting's


@lru_cache(maxsize=10_000)
def _common_numbers(
    model_digest: str, engine: str, weight_format: str, compute_dtype: str, compiled: bool
) -> tuple[int, ...]:
    form = f"{engine}/{weight_format}{'/compiled' if compiled else ''}"
    names = ("machine", f"model:{model_digest}", f"engine:{engine}", f"format:{form}")
    return tuple(_number(name) for name in names)


def design(
    effects: Effects, prior: tuple[Any, Any], names: Sequence[str], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (plans, names) prior standard deviations of the named effects, and (plans,) variance of all others.

    Args:
        prior: (plans,) standard deviation of each plan's log error, and the part its steps bring with them.
        scale: the metric's typical one, for effects common to all plans.
    """
    numbers = [_number(name) for name in names]
    column_of = np.full(len(_NAMES), -1)
    column_of[numbers] = np.arange(len(names))
    columns = column_of[effects.ids]
    whole, of_steps = (np.broadcast_to(sd, (effects.plans,)) ** 2 for sd in prior)
    common = np.array(_COMMON, dtype=bool)[effects.ids]
    variance = effects.shares * np.where(common, scale**2, np.maximum(whole - of_steps, 0.0)[effects.rows])
    variance = variance + effects.own * of_steps[effects.rows]
    known = columns >= 0
    matrix = np.zeros((effects.plans, len(names)))
    matrix[effects.rows[known], columns[known]] = np.sqrt(variance[known])
    return matrix, np.bincount(effects.rows[~known], weights=variance[~known], minlength=effects.plans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What was learned of one metric: effects in prior standard deviations, with their remaining covariance."""

    effects: tuple[str, ...]
    coefficients: tuple[float, ...]  # (effects,)
    covariance: tuple[tuple[float, ...], ...]  # (effects, effects)
    noise_sd: float  # of log(measured / predicted) once all effects are known
    scale: float  # prior standard deviation common effects are shares of
    widening: float  # conformal: factor on the standard deviation that gives the promised coverage
    n: int  # measurements it was learned from


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Corrections of each metric on one machine. Values only: JSON and back by knowledge_base.serde."""

    hardware_fingerprint: str
    corrections: Mapping[str, Correction]

    def correct(self, term: ModuleType, prediction: Prediction, features: Features) -> Prediction:
        """Return the prediction corrected, with the uncertainty that remains. Parts grow in proportion."""
        correction = self.corrections.get(term.QUANTITY)
        if correction is None:
            return prediction
        own = own_log_sd(prediction)
        log_shift, variance = posterior(correction, features.of(term), (own, prediction.step_log_sd))
        shift = getattr(term, "SHIFT", 0.0)
        if getattr(term, "NEVER_BELOW_NONE", False):
            log_shift = softened(np.log(prediction.mid + shift), log_shift)
        mid = (prediction.mid + shift) * np.exp(log_shift) - shift
        remaining = np.where(np.broadcast_to(own, variance.shape) > 0, correction.widening * np.sqrt(variance), 0.0)
        grown = np.exp(log_shift)
        parts = {} if shift else {name: part * grown for name, part in prediction.parts.items()}
        return replace(prediction, mid=mid, log_sd=np.hypot(remaining, prediction.inherited_log_sd), parts=parts)


def softened(predicted: Any, shift: Any) -> np.ndarray:
    """Return the shift of a log ratio that comes near to no loss but never past it: predicted x (exp(shift / predicted) - 1).

    A shift is learned in standard deviations, and those of a plan unlike any measured are wider than its loss: taken as it
    is, it would promise a model better than the unchanged one. Upwards, and where no loss was predicted, it is taken so.

    >>> softened(np.array([0.1, 0.1, 0.0]), np.array([-0.3, 0.3, -0.3])).round(3).tolist()
    [-0.095, 0.3, -0.3]
    """
    predicted, shift = np.broadcast_arrays(np.asarray(predicted, dtype=float), np.asarray(shift, dtype=float))
    lowered = (shift < 0) & (predicted > 0)
    scale = np.where(lowered, predicted, 1.0)
    return np.where(lowered, scale * np.expm1(np.minimum(shift / scale, 0.0)), shift)


def unsoftened(predicted: float, error: float) -> float:
    """Return the shift that `softened` makes that error of; of a loss that was next to none, that of SMALLEST of it."""
    if error >= 0 or predicted <= 0:
        return error
    return predicted * math.log(max(1 + error / predicted, SMALLEST))


def own_log_sd(prediction: Prediction) -> Any:
    """Return the standard deviation that is the term's own: what measuring its metric can shrink."""
    return np.sqrt(np.maximum(np.square(prediction.log_sd) - np.square(prediction.inherited_log_sd), 0.0))


def posterior(correction: Correction, effects: Effects, prior: tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return (plans,) expected log error and (plans,) its remaining variance, noise included."""
    matrix, unknown = design(effects, prior, correction.effects, correction.scale)
    mean = matrix @ np.array(correction.coefficients)
    covariance = np.array(correction.covariance).reshape(len(correction.effects), len(correction.effects))
    variance = np.sum((matrix @ covariance) * matrix, axis=1)
    return mean, np.maximum(variance, 0.0) + unknown + correction.noise_sd**2
