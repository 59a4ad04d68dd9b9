"""What samples support: medians, intervals, tail bounds, paired ratios, warm-up, stability, and verdicts.

Intervals of medians and percentiles come from order statistics (exact, whatever the distribution); those of means and
ratios from the bootstrap. All are two-sided at `confidence` unless said otherwise. Everything is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy

from knowledge_base.types import Figure
from planner.judging import CROWDED_CORES

CONFIDENCE = 0.95
TAIL_CONFIDENCE = 0.99
QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
BLOCKS_FOR_A_CLAIM = 9


# ---------------------------------------------------------------- medians and percentiles


def quantile_interval(
    samples: Sequence[float], q: float, confidence: float = CONFIDENCE
) -> tuple[float | None, float | None]:
    """Return lower and upper confidence bounds of the q-quantile, each one-sided at 1 - (1 - confidence) / 2.

        P(k-th smallest > quantile) = P(Binomial(n, q) <= k - 1)

    so the lower bound is the largest k for which that is at most the allowed tail, the upper one the smallest k for
    which it is at least the rest. A bound that n samples cannot give is None: with 50 samples nothing is known about
    how far up the 99th percentile may lie.
    Source: David & Nagaraja 2003, "Order Statistics", 7.1.
    """
    ordered, n = sorted(samples), len(samples)
    tail = (1 - confidence) / 2
    at_most = _binomial_cdf(n, q)[:n]  # at_most[i] = P(the sample of rank i + 1 lies above the quantile)
    low = max((x for x, p in zip(ordered, at_most, strict=True) if p <= tail), default=None)
    high = min((x for x, p in zip(ordered, at_most, strict=True) if 1 - p <= tail), default=None)
    return low, high


def minimal_samples(q: float, over: int, confidence: float = TAIL_CONFIDENCE) -> int:
    """Return how many samples are needed to say that the q-quantile is within a limit `over` of them exceed.

    The smallest n with P(Binomial(n, 1 - q) <= over) <= 1 - confidence: MLPerf's early stopping with d = 0.
    Source: github.com/mlcommons/inference, loadgen/early_stopping.cc.

    >>> [minimal_samples(0.95, over) for over in (0, 1, 2)], minimal_samples(0.99, 0)
    ([90, 130, 165], 459)
    """
    n = over + 1
    while sum(math.comb(n, i) * (1 - q) ** i * q ** (n - i) for i in range(over + 1)) > 1 - confidence:
        n += 1
    return n


def percentile(samples: Sequence[float], q: float) -> float | None:
    """Return the q-quantile by nearest rank, or None when there are fewer samples than `minimal_samples(q, 0)`."""
    if len(samples) < minimal_samples(q, 0):
        return None
    return sorted(samples)[math.ceil(q * len(samples)) - 1]


def _binomial_cdf(n: int, q: float) -> list[float]:
    total, cumulative = 0.0, []
    for k in range(n + 1):
        log_term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
        total += math.exp(log_term + k * math.log(q) + (n - k) * math.log1p(-q))
        cumulative.append(min(1.0, total))
    return cumulative


def median_figure(samples: Sequence[float], *, confidence: float = CONFIDENCE, note: str = "") -> Figure:
    """Return the median with its exact interval, and the 95th percentile where n allows one.

    With fewer than 6 samples no 95 % interval exists; the extremes are given with the confidence they do have,
    1 - 2^(1 - n).
    """
    values = _finite(samples)
    low, high = quantile_interval(values, 0.5, confidence)
    if low is None or high is None:
        low, high, confidence = min(values), max(values), 1 - 2.0 ** (1 - len(values))
    return Figure(
        value=float(numpy.median(values)), low=low, high=high, n=len(values), confidence=confidence, statistic="p50",
        samples=tuple(values), p95=percentile(values, 0.95), note=note,
    )  # fmt: skip


# ---------------------------------------------------------------- means and ratios


def mean_interval(
    samples: Sequence[float], *, seed: int, confidence: float = CONFIDENCE, resamples: int = 4000
) -> tuple[float, float]:
    """Return the interval of the mean: bootstrap percentiles, widened for few samples.

    The plain percentile interval is too narrow for small n by sqrt((n - 1) / n) and by normal against t quantiles, so
    percentiles are taken at Phi(sqrt(n / (n - 1)) t_(alpha/2, n-1)).
    Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", arXiv:1411.5279, 3.4.
    """
    from scipy.special import ndtr, stdtrit

    values = numpy.asarray(_finite(samples))
    n = len(values)
    if n == 1:
        return -math.inf, math.inf
    chosen = numpy.random.default_rng(seed).integers(0, n, size=(resamples, n))
    means = values[chosen].mean(axis=1)
    tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - confidence) / 2))
    low, high = numpy.quantile(means, [tail, 1 - tail])
    middle = float(values.mean())  # rounding must not put the mean outside its interval
    return min(float(low), middle), max(float(high), middle)


def mean_figure(samples: Sequence[float], *, seed: int, confidence: float = CONFIDENCE, note: str = "") -> Figure:
    """Return the mean with its bootstrap interval; a single sample is its own interval, with confidence 0."""
    values = _finite(samples)
    mean = float(numpy.mean(values))
    if len(values) == 1:
        return Figure(value=mean, low=mean, high=mean, n=1, confidence=0.0, samples=tuple(values), note=note)
    low, high = mean_interval(values, seed=seed, confidence=confidence)
    return Figure(
        value=mean, low=low, high=high, n=len(values), confidence=confidence, samples=tuple(values), note=note
    )


def exact_figure(value: float, note: str = "", source: str = "measured") -> Figure:
    """Return a figure that does not vary from one reading to the next, such as the bytes of a file."""
    value = float(value)
    return Figure(value=value, low=value, high=value, n=1, confidence=1.0, source=source, note=note)


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int, confidence: float = CONFIDENCE
) -> Figure:
    """Return ours / theirs as the geometric mean over paired blocks, with a bootstrap interval of the log ratios.

    `samples` are the ratios of the single blocks. Below 9 blocks the note says that no difference may be claimed.

    Raises:
        ValueError: unequal numbers of blocks, none, or a value that is not positive.
    """
    if len(ours) != len(theirs) or not ours or min(*ours, *theirs) <= 0:
        raise ValueError(f"needs equally many positive values, got {len(ours)} and {len(theirs)}")
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    figure = mean_figure(logs, seed=seed, confidence=confidence)
    few = "" if len(logs) >= BLOCKS_FOR_A_CLAIM else f"{len(logs)} blocks: too few to claim a difference (needs 9)"
    return Figure(
        value=math.exp(figure.value), low=math.exp(figure.low), high=math.exp(figure.high), n=len(logs),
        confidence=figure.confidence, statistic="ratio", samples=tuple(math.exp(x) for x in logs), note=few,
    )  # fmt: skip


def half_width(figure: Figure) -> float:
    """Return half the interval's width as a share of the value."""
    return (figure.high - figure.low) / 2 / abs(figure.value) if figure.value else math.inf


# ---------------------------------------------------------------- warm-up and stability


def warm_up_length(samples: Sequence[float], *, tolerance: float = 0.05) -> tuple[int, bool]:
    """Return how many first samples to drop, and whether the rest had settled.

    Dropped are at least 3, until the median of five samples is within 5 % of the median of the next five; at most 20 %
    of the time, where that leaves 3. With fewer than 13 samples shorter windows are compared; with fewer than 5
    nothing can be said, and they count as not settled.
    """
    n = len(samples)
    least = min(3, max(1, n // 4)) if n > 1 else 0
    window = min(5, (n - least) // 2)
    if window < 2:
        return least, False
    spent, allowed = 0.0, 0.2 * sum(samples)
    for drop in range(n - 2 * window + 1):
        if drop >= least:
            before = numpy.median(samples[drop : drop + window])
            after = numpy.median(samples[drop + window : drop + 2 * window])
            if abs(after - before) <= tolerance * before:
                return drop, True
            if spent + samples[drop] > allowed:
                return drop, False
        spent += samples[drop]
    return least, False


def stability(samples: Sequence[float], *, settled: bool = True, other_cores: float = 0.0) -> tuple[str, ...]:
    """Return what is suspicious about timings, each as a sentence with its advice; empty when they look sound.

    Thresholds: pyperf's (standard deviation above 10 % of the mean, extremes more than 50 % off it) and hyperfine's
    (the first run is the slow one). `other_cores`: cores that other processes kept busy meanwhile.
    """
    found = []
    values = numpy.asarray(_finite(samples))
    mean = float(values.mean())
    if not settled:
        found.append("timings had not settled when counting began: raise the time for each candidate")
    if len(values) >= 2 and values.std(ddof=1) > 0.10 * mean:
        spread = values.std(ddof=1) / mean
        found.append(f"timings vary by {spread:.0%} of their mean (above 10 %): close other programs")
    if values.min() < 0.5 * mean or values.max() > 1.5 * mean:
        found.append(f"the extremes lie at {values.min() / mean:.0%} and {values.max() / mean:.0%} of the mean")
    if len(values) >= 4 and values[0] > 1.25 * numpy.median(values[1:]) and values[0] == values.max():
        found.append("the first counted run was the slowest: warm-up was too short, or a cache was cold")
    if other_cores > CROWDED_CORES:
        found.append(f"other processes kept {other_cores:.2f} cores busy: a quiet machine would do better")
    return tuple(found)


# ---------------------------------------------------------------- verdicts


def bounds_of(figure: Figure, statistic: str) -> tuple[float | None, float | None]:
    """Return the confidence bounds of a statistic of a figure; None where n is too small for one.

    The figure's own statistic has its own interval. A percentile is bounded from the samples, at 98 % (each side at
    99 %, as MLPerf does): a lower bound of p95 exists from few samples, an upper one from 90.
    """
    if statistic in ("p90", "p95", "p99"):
        return quantile_interval(figure.samples, QUANTILES[statistic], 2 * TAIL_CONFIDENCE - 1)
    if statistic == figure.statistic or not figure.samples:
        return figure.low, figure.high
    if statistic == "p50":
        other = median_figure(figure.samples, confidence=figure.confidence)
    else:
        other = mean_figure(figure.samples, seed=0, confidence=figure.confidence)
    return (None, None) if other.confidence < figure.confidence else (other.low, other.high)


def point(figure: Figure, statistic: str) -> float | None:
    """Return a statistic of a figure: its own value, or one taken from the samples (p95 by nearest rank)."""
    if statistic == figure.statistic or not figure.samples:
        return figure.value
    if statistic == "mean":
        return sum(figure.samples) / len(figure.samples)
    ordered = sorted(figure.samples)
    return ordered[math.ceil(QUANTILES[statistic] * len(ordered)) - 1]


def judge(figure: Figure, limit: float, bound: str, statistic: str | None = None) -> str:
    """Return "met", "not met" or "inconclusive": a verdict is by confidence bound, never by the point estimate.

    Args:
        limit: in the figure's unit.
        bound: "max" or "min": the side the figure must stay on.
        statistic: "p50", "p95" or "mean"; default the figure's own.
    """
    low, high = bounds_of(figure, statistic or figure.statistic)
    if bound == "min":
        low, high, limit = (None if high is None else -high), (None if low is None else -low), -limit
    if high is not None and high <= limit:
        return "met"
    if low is not None and low > limit:
        return "not met"
    return "inconclusive"


def _finite(samples: Sequence[float]) -> list[float]:
    if not samples or not all(math.isfinite(x) for x in samples):
        raise ValueError(f"needs finite samples, at least one, got {list(samples)[:5]}")
    return [float(x) for x in samples]
