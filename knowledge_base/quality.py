"""What a method is expected to cost in quality, told from published figures: a fitted model read in plain Python.

Loss is ln(perplexity after / before). Figures fall into four groups by what is done to a model (`GROUPS`); in each,
asinh(loss / SCALE), the logarithm of any loss that is not tiny, is a linear function of `features`. The coefficients in
quality_fits.json are fitted by `python -m cost_models.quality_fit`; the file says on how many figures, and how well models
that were left out of the fit were told. The parts that belong to one method, family or variant are drawn towards zero
where evidence is thin, so a method seen once is told mostly by its group, with an interval that says so.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from itertools import combinations
from types import MappingProxyType
from typing import Any

GROUPS = (
    "weights",
    "activations",
    "zeros",
    "removal",
)  # rounded; rounded with activations or cache; zeroed; taken away
SCALE = 0.001  # losses below it are told apart by difference, above by ratio
COVERAGE = 0.9  # of the intervals
Z = 1.645  # standard deviations of a normal error on either side of its central 90 %
REFERENCE_PARAMS = 7e9
WHOLE_ROW = 4096  # weights that share a scale where no group is named: a row of a model of a few billion parameters

# Bits of a weight with its block's scales: the struct of each type in llama.cpp's ggml-common.h, and for the mixed ones
# (_m, _l and the like) file sizes of Llama-3-8B, https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md.
GGUF_BITS = MappingProxyType({
    "iq1_s": 1.6, "iq1_m": 1.8, "iq2_xxs": 2.1, "iq2_xs": 2.3, "iq2_s": 2.5, "iq2_m": 2.7, "q2_k_s": 2.9, "q2_k": 3.0,
    "iq3_xxs": 3.1, "iq3_xs": 3.3, "iq3_s": 3.4, "q3_k_s": 3.5, "iq3_m": 3.7, "q3_k_m": 3.9, "q3_k_l": 4.2,
    "iq4_xs": 4.25, "iq4_nl": 4.5, "q4_0": 4.5, "q4_k_s": 4.6, "q4_k_m": 4.9, "q4_1": 5.0, "q5_0": 5.5, "q5_k_s": 5.5,
    "q5_k_m": 5.7, "q5_1": 6.0, "q6_k": 6.6, "q8_0": 8.5,
})  # fmt: skip
# What the name of a method says of its bits, where the setting need not.
_NAMED: Mapping[str, Mapping[str, float]] = {
    "nf4": {"bits": 4, "group_size": 64}, "fp4": {"bits": 4, "group_size": 64}, "awq": {"group_size": 128},
    "fp8": {"bits": 8}, "mxfp8": {"bits": 8, "activation_bits": 8}, "nvfp4": {"bits": 4, "activation_bits": 4},
    "llm_int8": {"bits": 8, "activation_bits": 8},
}  # fmt: skip
_STRENGTHS = ("bits", "activation_bits", "kv_bits", "group_size", "sparsity", "compression")
_VARIANTS = ("act_order", "allocation", "double_quant", "imatrix", "pattern", "scaling", "symmetric")
Knobs = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """ln(perplexity after / before) with its 90 % interval; `n_rows` figures on `n_models` models are behind it.

    `sd` is one standard deviation towards zero. Losses are nearer to lognormal than to normal, so a normal error that
    reached as far up as the interval does would promise gains below.
    """

    group: str
    method: str
    mid: float
    low: float
    high: float
    sd: float
    n_rows: int
    n_models: int
    source: str


def strength(method: str, knobs: Knobs) -> dict[str, Any]:
    """Return the knobs with what names of formats and patterns mean said in bits and in the share of weights gone.

    A strength that is no positive number says nothing and is left out.

    >>> strength("gguf", {"type": "q4_0"})["bits"], strength("nf4", {})["bits"], strength("wanda", {"pattern": "2:4"})["sparsity"]
    (4.5, 4, 0.5)
    """
    said = dict(_NAMED.get(method, {})) | dict(knobs)
    if method == "gguf" and said.get("type") in GGUF_BITS:
        said = {"bits": GGUF_BITS[said["type"]], "group_size": 32} | said
    if kept := re.fullmatch(r"(\d+):([1-9]\d*)", str(said.get("pattern", ""))):  # N:M keeps N of every M
        said["sparsity"] = 1 - int(kept[1]) / int(kept[2])
    if "compression" in said:
        said["sparsity"] = said["compression"]
    return {k: v for k, v in said.items() if k not in _STRENGTHS or (isinstance(v, int | float) and v > 0)}


def group_of(knobs: Knobs, removes: str | None) -> str | None:
    """Return the group of a setting, by the knobs that say how strong it is; None where none does.

    Args:
        removes: "zeros" or "removal" where the method takes weights away: no knob tells the two apart.

    >>> group_of({"bits": 4}, None), group_of({"bits": 8, "activation_bits": 8}, None), group_of({"sparsity": 0.5}, "zeros")
    ('weights', 'activations', 'zeros')
    """
    if knobs.get("activation_bits", 16) < 16 or knobs.get("kv_bits", 16) < 16:
        return "activations"
    if "bits" in knobs:
        return "weights"
    return removes if "sparsity" in knobs else None


def features(group: str, method: str, knobs: Knobs, params: float, family: str) -> dict[str, float]:
    """Return a setting's features by name; "kind: detail" belongs to one method, family or variant.

    Args:
        knobs: as `strength` returns them.
        family: of the model; empty where it is not known.
    """
    size = math.log(params / REFERENCE_PARAMS) / 2
    found = {"level": 1.0, "size": size, f"method: {method}": 1.0}
    if group == "weights":
        found["bits"] = knobs["bits"] - 4.0
        found["group size"] = math.log2(min(knobs.get("group_size", WHOLE_ROW), WHOLE_ROW) / 128) / 5
    elif group == "activations":
        found["bits"] = (knobs.get("bits", 16) - 4.0) / 4
        found["activation bits"] = (knobs.get("activation_bits", 16) - 4.0) / 4
        found["cache bits"] = (knobs.get("kv_bits", 16) - 4.0) / 12
    elif group == "zeros":
        found["share"] = 3 * math.log(knobs["sparsity"] / 0.5)
    else:
        found["share"] = math.log(knobs["sparsity"] / 0.25)
    for name in _VARIANTS:
        if name in knobs:
            shared = "any" if name == "pattern" else method  # what a pattern costs is much the same for every method
            found[f"variant: {shared} {name}={knobs[name]}"] = 1.0
    if method == "gguf":
        found[f"variant: gguf {re.sub('[^a-z]', '', knobs['type'][:4])}"] = 1.0
    if family:
        found |= {f"family: {family}": 1.0, f"both: {method}, {family}": 1.0, f"size: {family}": size}
    return found


# ---------------------------------------------------------------- reading the fit


@cache
def _fits() -> dict[str, Any]:
    return json.loads((files("knowledge_base.data") / "field" / "quality_fits.json").read_text(encoding="utf-8"))


def priced_methods() -> tuple[str, ...]:
    """Return the methods whose loss can be told."""
    return tuple(_fits()["methods"])


@lru_cache(maxsize=256)
def family_of(name: str) -> str:
    """Return the family of a model's name among those with evidence; empty where it is none of them.

    >>> family_of("meta-llama/Llama-3.1-8B-Instruct"), family_of("facebook/opt-1.3b"), family_of("tiny-lm")
    ('llama-3', 'opt', '')
    """
    short = name.rpartition("/")[2].lower()
    for family in _fits()["families"]:
        if re.match(rf"{re.escape(family)}(\.\d+)?-(\d+x)?[\d.]+[bm]", short):
            return family
    return ""


def expected_loss(method: str, knobs: Knobs, params: float, family: str = "") -> Loss | None:
    """Return what a setting is expected to cost a model of that size; None where nothing published prices it.

    Sizes beyond those seen are held at the nearest seen one; below the smallest the spread is doubled, though not into a
    gain: what a small model loses hangs on how long it was trained, which no config tells. A model is never expected to
    gain by what is done to it; the interval may say that it could.

    Args:
        params: of the model, all of them.
        family: as `family_of` tells it.
    """
    return _expected(method, tuple(sorted(knobs.items())), params, family)


@lru_cache(maxsize=32_768)  # settings of all techniques for a few models
def _expected(method: str, items: tuple[tuple[str, Any], ...], params: float, family: str) -> Loss | None:
    evidence = _fits()["methods"].get(method, {})
    knobs = strength(method, dict(items))
    group = group_of(knobs, next((g for g in ("zeros", "removal") if g in evidence), None))
    if group is None or group not in evidence:
        return None
    fit, seen = _fits()["groups"][group], evidence[group]
    smallest, largest = fit["params"]
    known = family if family in fit["families"] else ""
    mean, sd = told(fit, group, method, knobs, min(max(params, smallest), largest), known)
    mean, reach = max(mean, 0.0), sd * seen["spread"] * fit["reach" if known else "reach_new_family"]
    mid, low, high = (SCALE * math.sinh(mean + side * reach) for side in (0, -1, 1))
    sd = mid - SCALE * math.sinh(mean - reach / Z)
    if params < smallest:
        low, high, sd = min(low, max(2 * low - mid, 0.0)), 2 * high - mid, 2 * sd
    return Loss(
        group=group, method=method, mid=mid, low=low, high=high, sd=sd, n_rows=seen["rows"], n_models=seen["models"],
        source=f"{seen['rows']} published figures of {method} on {seen['models']} models",
    )  # fmt: skip


def told(
    fit: Mapping[str, Any], group: str, method: str, knobs: Knobs, params: float, family: str
) -> tuple[float, float]:
    """Return mean and standard deviation of asinh(loss / SCALE) of one setting by one group's fit."""
    found = features(group, method, knobs, params, family)
    if family in fit["flat"]:
        del found["size"], found[f"size: {family}"]
    names, prior = fit["names"], fit["prior_sd"]
    mean, variance = 0.0, fit["noise_sd"] ** 2
    known = []
    for name, value in found.items():
        if name in names:
            known.append((names[name], value))
        else:  # never seen: no mean, and all of the doubt its kind has
            variance += (value * prior[name.partition(":")[0]]) ** 2
    for i, a in known:
        mean += a * fit["coefficients"][i]
        row = fit["covariance"][i]
        variance += a * a * row[i] + 2 * sum(a * b * row[j] for j, b in known if j < i)
    return mean, math.sqrt(variance)


# ---------------------------------------------------------------- compositions


@cache
def _pairs() -> Mapping[frozenset[str], Mapping[str, str]]:
    text = (files("knowledge_base.data") / "field" / "quality_compositions.csv").read_text(encoding="utf-8")
    return {frozenset((row["a"], row["b"])): row for row in csv.DictReader(io.StringIO(text))}


def together(a: Loss, b: Loss) -> Mapping[str, str] | None:
    """Return what quality_compositions.csv says of two losses: of their methods, else of their groups."""
    return _said(a.method, b.method, a.group, b.group)


@cache
def _said(method: str, other_method: str, group: str, other_group: str) -> Mapping[str, str] | None:
    return _pairs().get(frozenset((method, other_method))) or _pairs().get(frozenset((group, other_group)))


def lose_more_together(a: Loss, b: Loss) -> bool:
    """Return whether a source says that two losses together exceed their sum."""
    return _more(a.method, b.method, a.group, b.group)


@cache
def _more(*names: str) -> bool:
    said = _said(*names)
    return said is not None and said["effect"] == "more"


def compose(losses: Sequence[Loss]) -> Loss:
    """Return what several steps are expected to cost together.

    In log perplexity losses add up, and doubts as independent ones do (root of the sum of squares). Where two are known to
    lose more together than apart, their doubts add up too: no source says by how much, so the guess stays the sum and
    the interval makes room.

    Raises:
        ValueError: nothing to compose.
    """
    if not losses:
        raise ValueError("no losses to compose")
    more = [(i, j) for i, j in combinations(range(len(losses)), 2) if lose_more_together(losses[i], losses[j])]

    def doubt(parts: Sequence[float]) -> float:
        return math.sqrt(sum(p * p for p in parts) + 2 * sum(parts[i] * parts[j] for i, j in more))

    mid = sum(loss.mid for loss in losses)
    return Loss(
        group=" + ".join(loss.group for loss in losses),
        method=" + ".join(loss.method for loss in losses),
        mid=mid,
        low=mid - doubt([loss.mid - loss.low for loss in losses]),
        high=mid + doubt([loss.high - loss.mid for loss in losses]),
        sd=doubt([loss.sd for loss in losses]),
        n_rows=min(loss.n_rows for loss in losses),  # as strong as the weakest link
        n_models=min(loss.n_models for loss in losses),
        source="; ".join(loss.source for loss in losses),
    )
