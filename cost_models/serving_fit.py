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

# Standard deviation of a good measurement's logarithm: other clocks, versions, prompts. First tokens of clients in a
# closed loop also wait by chance, and by how far the clients stay in step.
NOISE = {"tpot": 0.08, "ttft": 0.15, "request": 0.15, "energy": 0.15, "power": 0.1, "memory": 0.05}
QUEUED_NOISE = 0.4
SLOPE_STEP = 1e-5  # of a coefficient's logarithm
CONVERGED = 1e-4  # share of the cost the last step may win: stopped at 1e-3, families of one card ended anywhere
EFFECT_SD = 0.2  # of the logarithm of what a class or a kind changes
POOLED_ROWS = 3  # of one group at most in the pooled law, which is about many models and devices
BETWEEN = 1.5  # how much more families differ from the pooled law than measurements from their family's law
# What is known of a family before it is measured: an eager host starts every kernel, an old scheduler walks its requests,
# prompts are cut into chunks (llama.cpp: n_ubatch, MLX: prefill_step_size, servers: max_num_batched_tokens). Eager PyTorch
# holds gate, up, product and hidden states of a whole prompt, which is what `activation` counts.
CHUNK_TOKENS = {"llama_cpp": 512, "mlx": 2048, "vllm": 8192, "sglang": 8192, "tensorrt_llm": 8192}
FAMILY_PRIORS: dict[str, dict[str, tuple[float, float]]] = {
    "transformers": {"layer_s": (8e-4, 0.3), "runtime_bytes": (2e8, 0.5), "activation": (1.0, 0.05)},
    "vllm_v0": {"sequence_s": (2e-4, 0.5)},
    **{name: {"chunk_tokens": (tokens, 0.01)} for name, tokens in CHUNK_TOKENS.items()},
}
# What is known of a class or kind: Apple's rates are those of plain shaders; experts are many small products with
# gathers between them; weights of few bits take more operations to unpack; llama.cpp used to write scores to memory.
EFFECT_PRIORS = {
    ("attention", "before 2024-07"): 0.3,
    ("prefill", "Apple"): 1.5, ("unpack", "8"): 1.5, ("unpack", "8 moe"): 1.5, ("unpack", "4"): 2.0, ("unpack", "4 moe"): 2.0,
    **{(name, f"{bits} moe"): 0.6 for name in ("prefill", "compute") for bits in ("16", "fp8", "8", "4", "fp4")},
}  # fmt: skip
NOT_POOLED = ("vllm_v0", "transformers")  # outdated, and eager: they say nothing about other engines
EFFECT_LOGS = {effect: float(np.log(value)) for effect, value in EFFECT_PRIORS.items()}
# What a class of weights ("fp8", "fp8 moe") or a kind of hardware may change.
BY_CLASS = ("read", "unpack", "compute", "prefill", "attention", "cache")
BY_KIND = ("read", "layer_s", "prefill", "power_base", "power_compute")
KINDS = ("consumer", "no matrix units", "AMD", "Apple", "Intel", "shared memory", "cpu")
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
    current = _few_of_each(observed.group) & ~np.isin(observed.family, NOT_POOLED)
    pooled, effects = _fit(observed.only(current), prior, EFFECT_LOGS, times=BETWEEN)
    laws = _named(POOLED, pooled, effects)
    for family in sorted({*observed.family, *FAMILY_PRIORS} - {POOLED}):
        near = {name: (pooled[name], sd) for name, (_, sd) in prior.items()}
        near |= {name: (np.log(mid), sd) for name, (mid, sd) in FAMILY_PRIORS.get(family, {}).items()}
        own = observed.only(observed.family == family)
        laws |= _named(family, *(_fit(own, near, effects) if len(own) else ({n: m for n, (m, _) in near.items()}, {})))
    return laws


def noise(observed: Observed) -> np.ndarray:
    """Return the (rows,) standard deviations of measurements' logarithms."""
    queued = (observed.quantity == "ttft") & (observed.deployments.clients > 0)
    return np.where(queued, QUEUED_NOISE, [NOISE[quantity] for quantity in observed.quantity])


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
    times: float = 1.0,
) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Return (logs of the coefficients, logs of the effects) that fit best, effects drawn towards known ones."""
    from scipy.optimize import least_squares

    effects = sorted(_effects(observed))
    masks = [np.array([where in t for t in observed.tags], dtype=float) for _, where in effects]
    names = list(prior)
    middle = np.array([prior[n][0] for n in names] + [known.get(e, 0.0) for e in effects])
    width = np.array([prior[n][1] for n in names] + [EFFECT_SD] * len(effects))
    sizes = Counter(observed.group)
    weight = np.array([sizes[g] ** -0.25 for g in observed.group]) / (times * noise(observed))
    measured = np.log(observed.value)
    parts = {q: np.flatnonzero(observed.quantity == q) for q in sorted(set(observed.quantity))}
    columns = {q: observed.only(rows).deployments for q, rows in parts.items()}

    def coefficients(x: np.ndarray) -> np.ndarray:
        """Return (names, rows) logarithms of the coefficients."""
        logs = np.repeat(x[: len(names), None], len(measured), axis=1)
        for (name, _), mask, value in zip(effects, masks, x[len(names) :]):
            logs[names.index(name)] += value * mask
        return logs

    def log_ratio(logs: np.ndarray) -> np.ndarray:
        found = np.empty(len(measured))
        for quantity, rows in parts.items():
            law = {name: np.exp(values[rows]) for name, values in zip(names, logs)}
            found[rows] = np.log(predict(quantity, columns[quantity], law)) - measured[rows]
        return found

    def residuals(x: np.ndarray) -> np.ndarray:
        off = log_ratio(coefficients(x)) * weight
        soft = np.sign(off) * np.sqrt(2 * (np.sqrt(1 + off**2) - 1))
        return np.concatenate([soft, (x - middle) / width])

    def slopes(x: np.ndarray) -> np.ndarray:
        # An effect is felt as its coefficient is, on the rows it is of: one evaluation for each coefficient.
        logs = coefficients(x)
        now = log_ratio(logs)
        of = {}
        for i, name in enumerate(names):
            logs[i] += SLOPE_STEP
            of[name] = (log_ratio(logs) - now) / SLOPE_STEP
            logs[i] -= SLOPE_STEP
        each = np.stack(
            [of[name] for name in names] + [of[name] * mask for (name, _), mask in zip(effects, masks)], axis=1
        )
        off = now * weight
        root = np.sqrt(1 + off**2)
        softened = weight / root * np.sqrt((root + 1) / 2)  # the derivative of `soft`
        return np.concatenate([each * softened[:, None], np.diag(1 / width)])

    x = least_squares(residuals, middle, slopes, method="lm", ftol=CONVERGED, xtol=1e-3).x
    return dict(zip(names, x[: len(names)])), dict(zip(effects, x[len(names) :]))


def _effects(observed: Observed) -> list[tuple[str, str]]:
    present = Counter(tag for tags in observed.tags for tag in tags)
    chosen = [tag for tag, n in present.items() if n >= 3 and tag not in USUAL]
    return [(name, tag) for tag in chosen for name in (BY_KIND if tag in KINDS else BY_CLASS)]
