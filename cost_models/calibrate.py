"""Fit corrections to measurements: Bayesian linear regression on log errors, with conformal intervals.

scikit-learn's BayesianRidge learns each effect's size and the noise; with no data it returns the prior, with a few
points it shrinks towards it. The width of intervals is set by leave-one-out errors (jackknife conformal prediction,
Barber et al. 2021, arXiv:1905.02928), tempered by Student's t while points are few.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np

from cost_models.calibration import (
    Calibration,
    Correction,
    Effects,
    Features,
    design,
    own_log_sd,
    posterior,
    unsoftened,
)
from cost_models.case import case_of
from cost_models.demand import chains
from cost_models.predict import COVERAGE, DEGREES, Figures, Z, predict_term
from cost_models.terms import in_order
from cost_models.terms._prediction import Prediction
from knowledge_base.types import Hardware, Measurement, Model, Workload

NOISE_SHARE = 0.25  # of a metric's prior uncertainty: what repeating a measurement or a simple physics leaves open
NOISE_FLOOR = 0.005
LEAVE_OUT = 24  # at most so many refits for the conformal width
PSEUDO = 9  # quantiles that stand in for leave-one-out errors while points are few
WORST_SCORE = 6.0  # in standard deviations: one spoiled measurement must not widen all intervals without bound

Group = tuple[Sequence[Measurement], Model, Workload]


def fit(
    measurements: Sequence[Measurement],
    model: Model,
    workload: Workload,
    hardware: Hardware,
    others: Sequence[Group] = (),
) -> Calibration:
    """Return corrections learned from measurements of this machine.

    Args:
        others: measurements of other models or workloads on this machine: what they tell of machine, engines and
            formats carries over.

    Failed measurements and modelled figures are left out; metrics without a measured figure stay uncorrected.
    """
    groups = []
    for taken, facts, load in ((measurements, model, workload), *others):
        good = [m.as_alone for m in taken if m.failure is None]
        if good:
            memo = chains(facts, load)
            nodes = [memo.node(m.plan) for m in good]
            groups.append((good, case_of(nodes, load, hardware), Features(nodes)))
    corrections: dict[str, Correction] = {}
    learned = Calibration(hardware_fingerprint=hardware.fingerprint, corrections=corrections)
    if not groups:
        return learned
    found = [Figures() for _ in groups]
    # Term by term over all groups, so that a term is fitted on predictions that use the corrected ones before it.
    for term in in_order():
        raws = [predict_term(term, case, figures) for (_, case, _), figures in zip(groups, found, strict=True)]
        seen = [
            _observe(term, good, features.of(term), raw)
            for (good, _, features), raw in zip(groups, raws, strict=True)
            if raw is not None
        ]
        if any(len(errors) for _, _, errors in seen):
            effects = _stack([effects for effects, _, _ in seen])
            priors = np.concatenate([prior for _, prior, _ in seen], axis=1)
            corrections[term.QUANTITY] = _fit_one(effects, priors, np.concatenate([errors for _, _, errors in seen]))
        for (_, _, features), figures, raw in zip(groups, found, raws, strict=True):
            if raw is not None:
                figures[term.QUANTITY] = learned.correct(term, raw, features)
    return learned


def _observe(
    term: ModuleType, good: Sequence[Measurement], effects: Effects, raw: Prediction
) -> tuple[Effects, np.ndarray, np.ndarray]:
    """Return effects, (2, plans) prior standard deviations and log errors of the plans whose figure was measured."""
    shift = getattr(term, "SHIFT", 0.0)
    mids = np.broadcast_to(raw.mid, (len(good),)) + shift
    priors = np.stack([np.broadcast_to(sd, (len(good),)) for sd in (own_log_sd(raw), raw.step_log_sd)])
    chosen, errors = [], []
    for i, measurement in enumerate(good):
        figure = measurement.figures.get(term.QUANTITY)
        if (
            figure is not None
            and figure.source == "measured"
            and priors[0, i] > 0
            and figure.value + shift > 0
            and mids[i] > 0
        ):
            chosen.append(i)
            error = math.log((figure.value + shift) / mids[i])
            errors.append(unsoftened(math.log(mids[i]), error) if getattr(term, "NEVER_BELOW_NONE", False) else error)
    return effects.take(chosen), priors[:, chosen], np.array(errors)


def _stack(parts: Sequence[Effects]) -> Effects:
    starts = np.cumsum([0, *(p.plans for p in parts)])
    return Effects(
        plans=int(starts[-1]),
        rows=np.concatenate([p.rows + start for p, start in zip(parts, starts, strict=False)]),
        ids=np.concatenate([p.ids for p in parts]),
        shares=np.concatenate([p.shares for p in parts]),
        own=np.concatenate([p.own for p in parts]),
    )


def _fit_one(effects: Effects, priors: np.ndarray, errors: np.ndarray) -> Correction:
    scale = float(np.median(priors[0]))
    noise = max(NOISE_SHARE * scale, NOISE_FLOOR)
    n = len(errors)
    scores = []
    for i in range(0, n, max(1, math.ceil(n / LEAVE_OUT))) if n > 2 else ():
        rest = [j for j in range(n) if j != i]
        without = _regress(effects.take(rest), priors[:, rest], errors[rest], noise, scale)
        mean, variance = posterior(without, effects.take([i]), (priors[0, [i]], priors[1, [i]]))
        scores.append(abs(errors[i] - float(mean[0])) / math.sqrt(float(variance[0])))
    return replace(_regress(effects, priors, errors, noise, scale), widening=conformal_quantile(scores) / Z)


def conformal_quantile(scores: Sequence[float]) -> float:
    """Return how many standard deviations hold COVERAGE of new errors, from leave-one-out errors in such units.

    The ceil((m + 1) COVERAGE)-th smallest of the m scores and PSEUDO quantiles of half of Student's t. That is the
    predictive distribution of a normal error whose variance is only known to about 1, from DEGREES
    observations, and has since been seen in the scores: quick to widen when errors exceed it.

    >>> round(conformal_quantile([]), 2), round(conformal_quantile([0.5] * 5), 2), round(conformal_quantile([3.0] * 5), 2)
    (1.53, 0.84, 3.0)
    """
    from scipy.special import stdtrit

    degrees = DEGREES + len(scores)
    scale = math.sqrt((DEGREES + sum(min(z, WORST_SCORE) ** 2 for z in scores)) / degrees)
    pseudo = [scale * float(stdtrit(degrees, 0.5 + k / (PSEUDO + 1) / 2)) for k in range(1, PSEUDO + 1)]
    pool = sorted([*scores, *pseudo])
    return pool[min(math.ceil((len(pool) + 1) * COVERAGE), len(pool)) - 1]


def _regress(effects: Effects, priors: np.ndarray, errors: np.ndarray, noise: float, scale: float) -> Correction:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import BayesianRidge

    names = effects.names()
    matrix, _ = design(effects, (priors[0], priors[1]), names, scale)
    # Effects are in prior standard deviations, so their precision is held near 1; the noise is learned from near `noise`.
    regression = BayesianRidge(
        fit_intercept=False, alpha_init=1 / noise**2, lambda_init=1.0, alpha_1=2.0, alpha_2=2.0 * noise**2,
        lambda_1=50.0, lambda_2=50.0, max_iter=100, tol=1e-3,
    )  # fmt: skip
    with warnings.catch_warnings():
        # Few points may still move a little at the last iteration; the answer is good to the tolerance we need.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regression.fit(matrix, errors)
    return Correction(
        effects=names,
        coefficients=tuple(float(c) for c in regression.coef_),
        covariance=tuple(tuple(float(c) for c in row) for row in regression.sigma_),
        noise_sd=float(1 / math.sqrt(regression.alpha_)),
        scale=scale,
        widening=1.0,
        n=len(errors),
    )
