"""What a few measurements on a device say about all its others: the law of its engine, updated in closed form.

The logarithm of measured / predicted is taken for a Gaussian process. Its covariance says how devices differ from the
law of their family: by coefficients of their own (each with its prior's width, felt where the prediction depends on
it), by a level of each quantity, by models, and smoothly in model and load; the rest is noise. A few measured rows
then give the expected error of every other row and what remains unknown of it. No row is needed twice, nothing is
fitted: the widths below are the only numbers, the same for all quantities and engines.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cost_models.serving import COEFFICIENTS, POOLED, Laws, law_of, predict
from cost_models.serving_fit import NOISE, Observed

# Standard deviations of log(measured / predicted) on devices the law was not fitted to, chosen so that four rows told the
# others best (eight are few too); such widths chosen on half of the published devices served the other half as well.
OF_COEFFICIENTS = 2.0  # of the widths in serving.COEFFICIENTS
# The others in those of a good measurement, serving_fit.NOISE: what varies between runs varies between devices.
OF_LEVEL = 0.5
OF_MODEL = 1.5
OF_LOAD = 8.0  # of model and load together: batch, lengths, devices
OF_NOISE = 0.3  # one device measured by one source
MODEL_REACH = 0.7  # in e-folds of parameters, active parameters and bits (twice)
LOAD_REACH = 3.0  # in e-folds of batch, prompt, output and devices (twice)
STEP = 0.01  # of a coefficient's logarithm, for the slope


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What is expected of some rows, as (rows,) arrays: factors on the law's prediction and how sure they are."""

    factor: np.ndarray
    log_sd: np.ndarray  # of log(measured / corrected prediction), the noise of one measurement included

    def interval(self, laws: Laws, quantity: str, family: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors on the law's prediction that 90 % of measurements lie between."""
        wide = np.exp(widening(laws, quantity, family) * self.log_sd)
        return self.factor / wide, self.factor * wide


def widening(laws: Laws, quantity: str, family: str) -> float:
    """Return how many standard deviations held 90 % of a family's errors after calibration; the pooled number if unknown."""
    return laws.get((family, f"calibrated {quantity}", "")) or laws[POOLED, f"calibrated {quantity}", ""]


def calibrated(laws: Laws, measured: Observed, asked: Observed) -> Calibrated:
    """Return what rows measured on one device with one engine say about others there; values of `asked` are not read."""
    known, wanted = Differences.of(laws, measured), Differences.of(laws, asked)
    error = np.log(measured.value) - known.log_predicted
    inner = known.covariance(known) + np.diag(known.noise_variance)
    cross = known.covariance(wanted)
    weights = np.linalg.solve(inner, cross)
    remaining = wanted.variance() - np.sum(weights * cross, axis=0)
    return Calibrated(np.exp(weights.T @ error), np.sqrt(np.maximum(remaining, 0.0) + wanted.noise_variance))


def most_telling(laws: Laws, rows: Observed, n: int) -> list[int]:
    """Return which `n` of some rows to measure first: those that leave least unknown of all. Values are not read."""
    of = Differences.of(laws, rows)
    unknown = of.covariance(of)
    chosen: list[int] = []
    for _ in range(min(n, len(rows))):
        gain = np.sum(unknown**2, axis=0) / (np.diag(unknown) + of.noise_variance)
        gain[chosen] = -1.0
        best = int(np.argmax(gain))
        chosen.append(best)
        unknown = unknown - np.outer(unknown[best], unknown[best]) / (unknown[best, best] + of.noise_variance[best])
    return chosen


@dataclass(frozen=True, slots=True)
class Differences:
    """By what the errors of rows may differ, as (rows, ...) arrays."""

    log_predicted: np.ndarray
    quantity: np.ndarray
    unit: np.ndarray  # standard deviation of a good measurement's logarithm
    slopes: np.ndarray  # (rows, coefficients): d log prediction / d log coefficient, times the coefficient's width
    model: np.ndarray
    load: np.ndarray

    @classmethod
    def of(cls, laws: Laws, rows: Observed) -> Differences:
        """Return those of some rows."""
        d, law = rows.deployments, law_of(laws, list(rows.family), list(rows.tags))
        log_predicted, slopes = np.empty(len(rows)), np.empty((len(rows), len(COEFFICIENTS)))
        for quantity in set(rows.quantity):
            here = rows.quantity == quantity
            some, own = rows.only(here).deployments, {name: value[here] for name, value in law.items()}
            log_predicted[here] = np.log(predict(quantity, some, own))
            for i, (name, (_, width)) in enumerate(COEFFICIENTS.items()):
                more = np.log(predict(quantity, some, own | {name: own[name] * np.exp(STEP)}))
                slopes[here, i] = OF_COEFFICIENTS * width * (more - log_predicted[here]) / STEP
        params = d.dense_params + d.expert_params
        model = (np.log(params), np.log(d.active_params), 2 * np.log(d.stored_bytes / params))
        load = (np.log(d.batch), np.log(d.prompt_tokens), np.log(d.output_tokens), 2 * np.log(d.devices))
        unit = np.array([NOISE[quantity] for quantity in rows.quantity])
        return cls(
            log_predicted, rows.quantity, unit, slopes,
            model=np.stack(model, axis=1) / MODEL_REACH, load=np.stack(load, axis=1) / LOAD_REACH,
        )  # fmt: skip

    @property
    def noise_variance(self) -> np.ndarray:
        """Return the (rows,) variance of measuring the same again."""
        return (OF_NOISE * self.unit) ** 2

    def covariance(self, other: Differences) -> np.ndarray:
        """Return the (rows, other rows) covariance of the two's errors."""
        models, loads = _apart(self.model, other.model), _apart(self.load, other.load)
        same = (self.quantity[:, None] == other.quantity[None]) * np.outer(self.unit, other.unit)
        alike = OF_LEVEL**2 + OF_MODEL**2 * np.exp(-models / 2) + OF_LOAD**2 * np.exp(-np.sqrt(models + loads))
        return self.slopes @ other.slopes.T + same * alike

    def variance(self) -> np.ndarray:
        """Return the (rows,) diagonal of the covariance of rows with themselves."""
        return np.sum(self.slopes**2, axis=1) + self.unit**2 * (OF_LEVEL**2 + OF_MODEL**2 + OF_LOAD**2)


def _apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum((a[:, None] - b[None]) ** 2, axis=-1)
