"""How close a plan's model stays to the unchanged one, on held-out text: perplexity, agreement, divergence."""

from __future__ import annotations

import math
import os
import statistics as plain_statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Failure, Figure
from planner.claims import numbers
from planner.isolation import Candidate
from planner.measuring import Observed, Progress
from planner.statistics import exact_figure, mean_figure, mean_interval

COLLAPSE_PERPLEXITY_RATIO = 10.0
COLLAPSE_AGREEMENT_RATIO = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Heldout:
    """Held-out token windows and the unchanged model's log-probabilities on them.

    `reference` is a float16 .npy (windows, positions, vocabulary) that `write_reference` made from the baseline.
    """

    windows: Path  # .npy of int32 (windows, tokens)
    count: int
    positions: int
    vocabulary: int
    reference: Path


def write_reference(candidate: Candidate, heldout: Heldout, *, progress: Progress | None = None) -> dict[str, Figure]:
    """Score the unchanged model, keep its log-probabilities for the others, and return its quality figures."""
    import numpy

    heldout.reference.parent.mkdir(parents=True, exist_ok=True)
    partial = heldout.reference.with_name(f".{heldout.reference.name}.{os.getpid()}.npy")
    shape = (heldout.count, heldout.positions, heldout.vocabulary)
    try:
        numpy.lib.format.open_memmap(partial, mode="w+", dtype=numpy.float16, shape=shape).flush()
        losses, _, _ = _score(candidate, heldout, partial, write=True, progress=progress)
        partial.replace(heldout.reference)
    finally:
        partial.unlink(missing_ok=True)
    note = "the unchanged model itself"
    return {
        "perplexity": perplexity(losses),
        "quality_loss_ratio": exact_figure(0.0, note),
        "agreement_ratio": exact_figure(1.0, note),
        "kl_divergence_nats": exact_figure(0.0, note),
    }


def observe(
    candidate: Candidate,
    heldout: Heldout,
    baseline: Figure,
    *,
    seed: int = 0,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> Observed:
    """Score a plan on held-out text against the unchanged model.

    Args:
        baseline: the unchanged model's `perplexity` figure; its samples are the losses the plan's are paired with.

    A collapsed model (perplexity above 10 times the baseline's, or agreement below 1 %) comes back with figures and
    `failure`. One that seems better than the unchanged model is scored a second time, and a warning says so.
    """
    losses, agreements, divergences = _score(candidate, heldout, heldout.reference, write=False, progress=progress)
    figures = _quality(losses, agreements, divergences, baseline, seed, confidence)
    warnings: tuple[str, ...] = ()
    gain = figures["quality_loss_ratio"]
    if gain.high < 0:
        again, _, _ = _score(candidate, heldout, heldout.reference, write=False, progress=progress)
        same = all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(losses, again, strict=True))
        verdict = "a second scoring agrees" if same else "a second scoring differs: not to be relied on"
        warnings = (f"quality above the unchanged model ({gain.value:+.2%} perplexity): {verdict}",)
        if not same:
            raise CandidateFailed("invalid_result", f"scoring the same text twice gave other losses; {warnings[0]}")
    return Observed(figures=figures, warnings=warnings, failure=_collapse(figures, baseline))


def _quality(
    losses: Sequence[float], agreements: Sequence[float], divergences: Sequence[float],
    baseline: Figure, seed: int, confidence: float,
) -> dict[str, Figure]:  # fmt: skip
    if len(baseline.samples) != len(losses):
        raise ValueError(f"the baseline has {len(baseline.samples)} windows, this plan {len(losses)}")
    differences = [a - b for a, b in zip(losses, baseline.samples, strict=True)]
    difference = mean_figure(differences, seed=seed, confidence=confidence)
    loss = Figure(
        value=math.expm1(min(difference.value, 700.0)), low=math.expm1(min(difference.low, 700.0)),
        high=math.expm1(min(difference.high, 700.0)), n=len(losses), confidence=difference.confidence,
        note="paired over held-out windows", samples=difference.samples,
    )  # fmt: skip
    return {
        "perplexity": perplexity(losses, seed=seed, confidence=confidence),
        "quality_loss_ratio": loss,
        "agreement_ratio": mean_figure(agreements, seed=seed, confidence=confidence),
        "kl_divergence_nats": mean_figure(divergences, seed=seed, confidence=confidence),
    }


def perplexity(losses: Sequence[float], *, seed: int = 0, confidence: float = 0.95) -> Figure:
    """Return exp of the mean loss with its interval over windows. `samples` are the windows' losses, in nats."""
    mean = plain_statistics.fmean(losses)
    low, high = mean_interval(losses, seed=seed, confidence=confidence) if len(losses) > 1 else (mean, mean)
    return Figure(
        value=math.exp(min(mean, 700.0)), low=math.exp(min(low, 700.0)), high=math.exp(min(high, 700.0)), n=len(losses),
        confidence=confidence if len(losses) > 1 else 0.0, samples=tuple(losses), note="samples are losses in nats",
    )  # fmt: skip


def _collapse(figures: Mapping[str, Figure], baseline: Figure) -> Failure | None:
    ratio = figures["perplexity"].value / baseline.value
    agreement = figures["agreement_ratio"].value
    if ratio <= COLLAPSE_PERPLEXITY_RATIO and agreement >= COLLAPSE_AGREEMENT_RATIO:
        return None
    text = f"perplexity is {ratio:.3g} times the unchanged model's, agreement {agreement:.1%}"
    return Failure(kind="quality_collapse", stage="quality", message=text)


def _score(
    candidate: Candidate, heldout: Heldout, reference: Path, *, write: bool, progress: Progress | None
) -> tuple[list[float], list[float], list[float]]:
    """Return each window's mean loss, and (not when writing) its agreement ratio and mean divergence."""
    payload = {
        "windows": str(heldout.windows.resolve()), "reference": str(reference.resolve()), "first": 0,
        "count": heldout.count, "write": write,
    }  # fmt: skip
    reply = candidate.call("fidelity", payload, timeout_s=candidate.limits.time_s, progress=progress)
    losses = numbers(reply, "loss", heldout.count, 0, 1e4)
    if write:
        return losses, [], []
    agreements = numbers(reply, "agreements", heldout.count, 0, heldout.positions)
    # the reference is normalised in float32: a divergence of nothing may come out a hair below zero
    sums = numbers(reply, "kl_sum", heldout.count, -1e-4 * heldout.positions, 1e9)
    return losses, [a / heldout.positions for a in agreements], [max(0.0, x) / heldout.positions for x in sums]
