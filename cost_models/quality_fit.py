"""Fit what methods cost in quality to the published figures, and tell how far models left out were missed.

    python -m cost_models.quality_fit

rewrites knowledge_base/data/field/quality_fits.json, which `knowledge_base/quality.py` reads. One Bayesian ridge regression
(scikit-learn) for each group of settings. What belongs to one method, family or variant has a narrow prior around zero
(`PRIOR_SD`), so it is as large as its evidence is strong. Figures far off the line, a method that collapses on one model,
count less, as under Student's t. Intervals are conformal: wide enough to have held 90 % of the figures of models that
were left out of the fit (jackknife, Barber et al. 2021, arXiv:1905.02928), wider for methods that were missed by more.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from knowledge_base import quality
from knowledge_base.field.entries import EvidenceRow

FITS = Path(quality.__file__).parent / "data" / "field" / "quality_fits.json"
METRICS = ("perplexity", "perplexity_ratio")
ZEROING = ("unstructured_pruning", "semi_structured_pruning")  # topics whose methods leave every weight in its place
# In asinh(loss / SCALE), where a factor of e is 1. Chosen by leave-model-out error.
PRIOR_SD = {"level": 4.0, "family": 0.5, "both": 0.4, "method": 1.0, "variant": 0.5, "size": 0.5}
SLOPE_SD = 1.5
T_DEGREES = 4  # of Student's t: how little a figure far off the line counts
ROUNDS = 8  # of weighing figures anew
OWN_WEIGHT = 4  # figures a method must have missed by more, or less, than its group before its own spread counts half


@dataclass(frozen=True, slots=True)
class Figure:
    """One published loss: what was done to which model, and asinh(loss / SCALE)."""

    group: str
    method: str
    knobs: Mapping[str, Any]
    params: float
    family: str
    model: tuple[str, float]  # family and size: versions and chat models of one base count as one
    value: float

    @property
    def loss(self) -> float:
        return quality.SCALE * math.sinh(self.value)


def figures(evidence: Iterable[EvidenceRow], zeroing: Iterable[str]) -> list[Figure]:
    """Return the losses of perplexity among the evidence that one method alone and a strength can explain.

    Args:
        zeroing: methods that set weights to zero where they stand; others with a `sparsity` take them away.
    """
    zeroing = set(zeroing)
    found = []
    for row in evidence:
        if row.metric not in METRICS or len(row.steps) != 1 or not row.params_b or not row.baseline:
            continue
        step = row.steps[0]
        knobs = quality.strength(step.technique, step.knobs)
        group = quality.group_of(knobs, "zeros" if step.technique in zeroing else "removal")
        if group is not None:
            value = math.asinh(math.log(row.value / row.baseline) / quality.SCALE)
            base = (row.family or row.model, row.params_b)
            found.append(Figure(group, step.technique, knobs, row.params_b * 1e9, row.family, base, value))
    return found


# ---------------------------------------------------------------- one group


def fit_group(group: str, data: Sequence[Figure]) -> dict[str, Any]:
    """Return the fit of one group as `quality.told` reads it.

    A larger model never loses more: where a family's figures say so, size says nothing in that family.
    """
    flat: set[str] = set()
    while True:
        fit = _regress(group, data, flat)
        slope = dict(zip(fit["names"], fit["coefficients"], strict=True))
        rising = {
            family for family in fit["families"]
            if family not in flat and slope.get("size", 0.0) + slope.get(f"size: {family}", 0.0) > 0
        }  # fmt: skip
        if not rising:
            return fit
        flat |= rising


def _regress(group: str, data: Sequence[Figure], flat: set[str]) -> dict[str, Any]:
    names, matrix = design(group, data, flat)
    scale = np.array([prior_sd(name) for name in names])
    ridge = regression(matrix * scale, np.array([f.value for f in data]))
    shrink = 1 / math.sqrt(ridge.lambda_)
    return {
        "params": [min(f.params for f in data), max(f.params for f in data)],
        "families": sorted({f.family for f in data if f.family}),
        "flat": sorted(flat),
        "noise_sd": 1 / math.sqrt(ridge.alpha_),
        "prior_sd": {kind: shrink * prior_sd(f"{kind}: ") for kind in ("method", "variant", "family", "both", "size")},
        "names": {name: i for i, name in enumerate(names)},
        "coefficients": (ridge.coef_ * scale).tolist(),
        "covariance": [row[: i + 1] for i, row in enumerate((ridge.sigma_ * np.outer(scale, scale)).tolist())],
    }


def design(group: str, data: Sequence[Figure], flat: Collection[str]) -> tuple[list[str], np.ndarray]:
    """Return the features' names and their matrix (figures, features); in `flat` families size has no part."""
    rows = [quality.features(group, f.method, f.knobs, f.params, f.family) for f in data]
    for figure, row in zip(data, rows, strict=True):
        if figure.family in flat:
            del row["size"], row[f"size: {figure.family}"]
    names = sorted({name for row in rows for name in row})
    return names, np.array([[row.get(name, 0.0) for name in names] for row in rows])


def regression(matrix: np.ndarray, values: np.ndarray) -> Any:
    """Return scikit-learn's regression of the values on columns in prior standard deviations."""
    from sklearn.linear_model import BayesianRidge

    weights = np.ones(len(values))
    for _ in range(ROUNDS):
        # The columns' common precision is held near 1; the noise is free.
        ridge = BayesianRidge(fit_intercept=False, alpha_init=4.0, lambda_init=1.0, lambda_1=50.0, lambda_2=50.0)
        ridge.fit(matrix, values, sample_weight=weights)
        missed = np.abs(values - matrix @ ridge.coef_)
        weights = (T_DEGREES + 1) / (T_DEGREES + (missed / max(1.48 * np.median(missed), 0.05)) ** 2)
    return ridge


def prior_sd(name: str) -> float:
    """Return how large a coefficient of that name may be expected to be: one of a kind ("family: opt"), or a slope."""
    kind, colon, _ = name.partition(":")
    return PRIOR_SD[kind] if colon or kind == "level" else SLOPE_SD


# ---------------------------------------------------------------- left out


@dataclass(frozen=True, slots=True)
class Guess:
    """What a fit that never saw the figure's model said of it. `score`: the miss in standard deviations."""

    figure: Figure
    left_out: Any
    mean: float
    sd: float

    @property
    def score(self) -> float:
        return abs(self.figure.value - self.mean) / self.sd

    @property
    def missed(self) -> float:
        """The absolute error in log perplexity."""
        return abs(self.figure.loss - quality.SCALE * math.sinh(max(self.mean, 0.0)))


def leave_out(data: Sequence[Figure], what: str) -> list[Guess]:
    """Return a guess for each figure of one group by a fit without its model ("model") or family ("family")."""
    key = {"model": lambda f: f.model, "family": lambda f: f.family or f.model}[what]
    guesses = []
    for out in sorted({key(f) for f in data}, key=str):
        rest = [f for f in data if key(f) != out]
        fit = fit_group(data[0].group, rest)
        low, high = fit["params"]
        for f in data:
            if key(f) == out:
                family = f.family if f.family in fit["families"] else ""
                mean, sd = quality.told(fit, f.group, f.method, f.knobs, min(max(f.params, low), high), family)
                guesses.append(Guess(f, out, mean, sd))
    return guesses


def spreads(guesses: Sequence[Guess]) -> dict[str, float]:
    """Return for each method how much wider its intervals are than its group's.

    By how much more it was missed, drawn towards one where it has few figures, and by the root of 1 + 1/models, as the
    next model's figure is less sure than the mean of so few.
    """
    misses: dict[str, list[Guess]] = defaultdict(list)
    for guess in guesses:
        misses[guess.figure.method].append(guess)
    typical = float(np.mean([min(g.score, 3.0) ** 2 for g in guesses]))
    return {
        method: math.sqrt(
            (OWN_WEIGHT + sum(g.score**2 for g in own) / typical) / (OWN_WEIGHT + len(own))
            * (1 + 1 / len({g.figure.model for g in own}))
        )
        for method, own in sorted(misses.items())
    }  # fmt: skip


def reach(guesses: Sequence[Guess], spread: Mapping[str, float]) -> float:
    """Return how many standard deviations held COVERAGE of the figures: the conformal quantile."""
    scores = sorted(g.score / spread.get(g.figure.method, 1.0) for g in guesses)
    return scores[min(math.ceil((len(scores) + 1) * quality.COVERAGE), len(scores)) - 1]


def held(guesses: Sequence[Guess], more: Sequence[Guess] = ()) -> list[bool]:
    """Return whether each figure lies in its interval, with widths set by the other models' figures alone.

    Args:
        more: guesses that widen the intervals where they were missed by more.
    """
    inside = []
    for guess in guesses:
        others, wider = ([g for g in part if g.left_out != guess.left_out] for part in (guesses, more))
        spread = spreads(others)
        width = max(reach(part, spread) for part in (others, wider) if part)
        inside.append(guess.score <= width * spread.get(guess.figure.method, 1.0))
    return inside


# ---------------------------------------------------------------- all groups


def build(data: Sequence[Figure]) -> dict[str, Any]:
    """Return quality_fits.json."""
    groups: dict[str, Any] = {}
    methods: dict[str, Any] = defaultdict(dict)
    for group in quality.GROUPS:
        own = [f for f in data if f.group == group]
        guesses = leave_out(own, "model")
        inside, spread = held(guesses), spreads(guesses)
        groups[group] = fit_group(group, own) | {
            "reach": reach(guesses, spread),
            "reach_new_family": max(reach(guesses, spread), reach(leave_out(own, "family"), spread)),
        }
        for method in spread:
            mine = [(g, ok) for g, ok in zip(guesses, inside, strict=True) if g.figure.method == method]
            methods[method][group] = {
                "rows": len(mine),
                "models": len({g.figure.model for g, _ in mine}),
                "spread": spread[method],
                "median_error": float(np.median([g.missed for g, _ in mine])),
                "coverage": float(np.mean([ok for _, ok in mine])),
            }
    families = sorted({f for fit in groups.values() for f in fit["families"]}, key=lambda f: (-len(f), f))
    return {"families": families, "methods": dict(sorted(methods.items())), "groups": groups}


def rounded(value: Any) -> Any:
    """Return the value with every number in six digits: what the last bits say differs between machines."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def text(fits: Mapping[str, Any]) -> str:
    """Return the file's text: indented, but each list of numbers on one line."""
    indented = json.dumps(rounded(fits), indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), indented) + "\n"


def published() -> list[Figure]:
    """Return the figures among the repository's own evidence."""
    from knowledge_base.field import field

    known = field()
    zeroing = {m.id for topic in ZEROING for m in known.below(topic)}
    return figures(known.evidence, zeroing)


def main() -> None:
    """Fit, and write the file."""
    FITS.write_text(text(build(published())), encoding="utf-8")
    print(FITS)


if __name__ == "__main__":
    main()
