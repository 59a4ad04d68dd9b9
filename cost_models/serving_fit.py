"""Fit the laws of serving engines to measurements: a pooled law first, then each family's, drawn towards the pooled.

Errors are of the logarithm, soft-L1 so that a few wrong rows do not bend the law, and rows of one model on one device
count as fewer than they are. Every coefficient is drawn towards its prior (serving.COEFFICIENTS) and every effect of a
class of weights or kind of hardware towards none, so that what was not measured keeps the prior.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cost_models.serving import COEFFICIENTS, POOLED, Deployments, predict

# Standard deviation of a good measurement's logarithm: other clocks, versions, prompts; first tokens also wait by chance.
NOISE = {"tpot": 0.08, "ttft": 0.2, "request": 0.15, "energy": 0.15, "power": 0.1, "memory": 0.05}
EFFECT_SD = 0.2  # of the logarithm of what a class or a kind changes
POOLED_ROWS = 3  # of one group at most in the pooled law, which is about many models and devices
BETWEEN = 8.0  # how much more families differ from the pooled law than measurements from their family's law
# What is known of a family before it is measured: an eager host starts every kernel, an old scheduler walks its requests.
FAMILY_PRIORS = {
    "transformers": {"layer_s": (8e-4, 0.3), "runtime_bytes": (2e8, 0.5)},
    "vllm_v0": {"sequence_s": (2e-4, 0.5)},
}
# What is known of a class or kind: published rates of consumer and shared-memory devices are those of their shaders or
# of wide sums, which engines double; experts are many small products with gathers between them.
EFFECT_PRIORS = {
    ("prefill", "consumer"): 2.0, ("prefill", "shared memory"): 2.0, ("prefill", "Apple"): 1.5,
    **{(name, f"{bits} moe"): 0.6 for name in ("prefill", "compute") for bits in ("16", "fp8", "8", "4", "fp4")},
}  # fmt: skip
OUTDATED = ("vllm_v0",)  # says nothing about engines of today
EFFECT_LOGS = {effect: float(np.log(value)) for effect, value in EFFECT_PRIORS.items()}
# What a class of weights ("fp8", "fp8 moe") or a kind of hardware may change.
BY_CLASS = ("read", "compute", "prefill", "cache")
BY_KIND = ("read", "layer_s", "prefill", "power_base", "power_compute")
KINDS = ("consumer", "AMD", "Apple", "Intel", "shared memory", "cpu")
USUAL = ("16", "data centre")  # what the coefficients themselves are of


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Measurements: deployments with what was found, as (rows,) columns."""

    deployments: Deployments
    quantity: np.ndarray  # a name in serving.QUANTITIES
    value: np.ndarray
    family: np.ndarray
    tags: np.ndarray  # frozensets: class of weights, kind of hardware
    group: np.ndarray  # rows of one model on one device with one engine

    def __len__(self) -> int:
        return len(self.value)

    def only(self, chosen: np.ndarray) -> Observed:
        """Return the chosen rows."""
        d = Deployments(**{f.name: getattr(self.deployments, f.name)[chosen] for f in fields(Deployments)})
        return Observed(deployments=d, **{f.name: getattr(self, f.name)[chosen] for f in fields(self)[1:]})


def fit(observed: Observed) -> dict[tuple[str, str, str], float]:
    """Return the pooled law `*` and one for each family that was measured, or of which something is known."""
    prior = {name: (np.log(mid), sd) for name, (mid, sd) in COEFFICIENTS.items()}
    current = _few_of_each(observed.group) & ~np.isin(observed.family, (*OUTDATED, *FAMILY_PRIORS))
    pooled, effects = _fit(observed.only(current), prior, EFFECT_LOGS, noise=BETWEEN)
    laws = _named(POOLED, pooled, effects)
    for family in sorted({*observed.family, *FAMILY_PRIORS}):
        near = {name: (pooled[name], sd) for name, (_, sd) in prior.items()}
        near |= {name: (np.log(mid), sd) for name, (mid, sd) in FAMILY_PRIORS.get(family, {}).items()}
        own = observed.only(observed.family == family)
        laws |= _named(family, *(_fit(own, near, effects) if len(own) else ({n: m for n, (m, _) in near.items()}, {})))
    return laws


def _few_of_each(groups: np.ndarray) -> np.ndarray:
    """Return which rows stay when each group keeps POOLED_ROWS at most, evenly spaced."""
    kept = np.zeros(len(groups), dtype=bool)
    for group in set(groups):
        rows = np.flatnonzero(groups == group)
        kept[rows[np.unique(np.linspace(0, len(rows) - 1, POOLED_ROWS).astype(int))]] = True
    return kept


def _named(family: str, base: Mapping[str, float], effects: Mapping[tuple[str, str], float]) -> dict[Any, float]:
    rows = {(family, name, ""): float(np.exp(value)) for name, value in base.items()}
    return rows | {(family, name, where): float(np.exp(value)) for (name, where), value in effects.items()}


def _fit(
    observed: Observed,
    prior: Mapping[str, tuple[float, float]],
    known: Mapping[tuple[str, str], float],
    noise: float = 1.0,
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Return (logs of the coefficients, logs of the effects) that fit best, effects drawn towards known ones."""
    from scipy.optimize import least_squares

    effects = sorted(_effects(observed))
    masks = [np.array([where in t for t in observed.tags], dtype=float) for _, where in effects]
    names = list(prior)
    middle = np.array([prior[n][0] for n in names] + [known.get(e, 0.0) for e in effects])
    width = np.array([prior[n][1] for n in names] + [EFFECT_SD] * len(effects))
    sizes = Counter(observed.group)
    weight = np.array([sizes[g] ** -0.25 / (noise * NOISE[q]) for g, q in zip(observed.group, observed.quantity)])
    measured = np.log(observed.value)
    parts = {q: np.flatnonzero(observed.quantity == q) for q in sorted(set(observed.quantity))}
    columns = {q: observed.only(rows).deployments for q, rows in parts.items()}

    def residuals(x: np.ndarray) -> np.ndarray:
        logs = {name: np.full(len(measured), x[i]) for i, name in enumerate(names)}
        for (name, _), mask, value in zip(effects, masks, x[len(names) :]):
            logs[name] = logs[name] + value * mask
        off = np.empty(len(measured))
        for quantity, rows in parts.items():
            law = {name: np.exp(values[rows]) for name, values in logs.items()}
            off[rows] = np.log(predict(quantity, columns[quantity], law)) - measured[rows]
        off = off * weight
        soft = np.sign(off) * np.sqrt(2 * (np.sqrt(1 + off**2) - 1))
        return np.concatenate([soft, (x - middle) / width])

    x = least_squares(residuals, middle, max_nfev=40, ftol=1e-3, xtol=1e-3).x
    return dict(zip(names, x[: len(names)])), dict(zip(effects, x[len(names) :]))


def _effects(observed: Observed) -> list[tuple[str, str]]:
    present = Counter(tag for tags in observed.tags for tag in tags)
    chosen = [tag for tag, n in present.items() if n >= 3 and tag not in USUAL]
    return [(name, tag) for tag in chosen for name in (BY_KIND if tag in KINDS else BY_CLASS)]
