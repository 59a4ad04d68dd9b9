"""What a load showed: percentiles with intervals, rates, goodput, whether it was steady, and verdicts on limits.

Percentiles are over all counted requests, those without an answer at the far end: a service does not become quick by
refusing. Their intervals come from order statistics, which take requests as independent; near saturation they are
not, and that is said. Rates have the interval of their mean over ten equal parts of the load.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Budget, Figure, Workload
from planner.judging import CROWDED_CORES, WORDS, in_a_crowd
from planner.load.client import Answer
from planner.load.driving import Driven, Protocol
from planner.results import Verdict

PARTS = 10  # of the counted time
GROWS = 27  # Kendall's S of ten parts: by chance it is as high in 0.8 % of loads whose parts are independent
MORE = 1.5  # times as many under way in the last three parts as in the first three
REFUSED = 0.05  # of the requests, beyond which a service that refuses is full rather than unlucky
LATE_S = 0.010  # of the generator, beyond which its own figures suffer
ALIKE = 0.3  # correlation of requests with the next, beyond which intervals are too narrow
SEVERAL = 0.5  # cores of the generator, beyond which it may be in the way
LATENCIES = ("ttft_s", "tpot_s", "itl_s", "latency_s")
PERCENTILES = ("p50", "p95", "p99")
RESAMPLES, MOST_GAPS = 200, 200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentile:
    """A percentile over requests. `value`, `low` and `high` are in the unit of the metric."""

    value: float | None  # null: the request of that rank was not answered
    low: float | None  # null: too few requests to tell
    high: float | None  # null: too few requests to tell, or not answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """How many requests were counted, and what became of them."""

    counted: int
    answered: int
    refused: int  # HTTP 429 or 503
    failed: int  # any other way
    short: int  # of the answered, with fewer tokens than asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What clients met at a service under one load."""

    scenario: str  # "arrivals", "trace", "clients" or "all at once"
    requests: Requests
    percentiles: Mapping[str, Mapping[str, Percentile]]  # by metric, then p50, p95, p99
    figures: Mapping[str, Figure]  # by metric, of the answered requests
    steady: bool
    remarks: tuple[str, ...]  # what to know before believing the figures
    verdicts: tuple[Verdict, ...]
    protocol: Mapping[str, Any]  # how it was driven


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A load that a service was put under."""

    service: str  # URL
    model: str  # as the service calls it
    workload: Workload
    seen: Seen


def seen(driven: Driven, protocol: Protocol, limits: Sequence[Budget] = ()) -> Seen:
    """Return what a load showed, judged by limits on metrics under load."""
    counted = driven.counted
    answered = [a for a in counted if a.answered]
    figures = _figures(driven, counted, answered, limits, protocol.seed)
    percentiles = {name: _percentiles(name, counted, answered, protocol.seed) for name in LATENCIES}
    found = {name: told for name, told in percentiles.items() if told}
    problem = _unsteady(driven, counted)
    requests = Requests(
        counted=len(counted), answered=len(answered), refused=sum(a.refused for a in counted),
        failed=sum(not a.answered and not a.refused for a in counted),
        short=sum(a.tokens < a.asked_tokens for a in answered),
    )  # fmt: skip
    used = asdict(driven.used) if driven.used else {}
    other = _crowd(driven)
    verdicts = (_verdict(limit, found, figures, problem) for limit in limits if limit.level != "off")
    record = {
        **asdict(protocol), "scenario": driven.scenario, "counted_s": driven.until_s - driven.from_s,
        "late_p95_s": _rank(sorted(driven.late_s), 0.95) if driven.late_s else 0.0, **used,
        "latency_from": "when a request was due", "confidence": 0.95,
    }  # fmt: skip
    return Seen(
        scenario=driven.scenario, requests=requests, percentiles=found, figures=figures,
        steady=not problem, remarks=tuple(_remarks(driven, counted, answered, problem)),
        verdicts=tuple(in_a_crowd(verdict, other) for verdict in verdicts), protocol=record,
    )  # fmt: skip


# ---------------------------------------------------------------- figures


def _figures(
    driven: Driven, counted: Sequence[Answer], answered: Sequence[Answer], limits: Sequence[Budget], seed: int
) -> dict[str, Figure]:
    from planner.statistics import exact_figure, mean_figure, median_figure

    note = f"{driven.scenario}; of {len(answered)} requests answered of {len(counted)}"
    figures = {
        name: median_figure(values, note=note)
        for name in ("ttft_s", "tpot_s", "latency_s")
        if (values := [v for a in answered if (v := _of(name, a)) is not None])
    }
    if answered and any(a.gaps_s for a in answered):
        middle, tail = (_gaps(answered, q, seed) for q in (0.5, 0.95))
        figures["itl_s"] = Figure(
            value=middle[0], low=middle[1], high=middle[2], n=len(answered), statistic="p50", p95=tail[0], note=note
        )
    seconds = driven.until_s - driven.from_s
    if seconds > 0 and answered:
        rates = {
            "throughput_tokens_per_s": _rates(driven, [(t, a.tokens / len(a.token_s)) for a in driven.answers if a.answered for t in a.token_s]),
            "requests_per_s": _rates(driven, [(a.token_s[-1], 1.0) for a in driven.answers if a.answered]),
        }  # fmt: skip
        bounds = _bounds(limits)
        if bounds:
            good = [(a.token_s[-1], 1.0) for a in driven.answers if a.answered and _within(a, bounds)]
            rates["goodput_requests_per_s"] = _rates(driven, good)
        figures |= {name: mean_figure(rate, seed=seed, note=note) for name, rate in rates.items()}
    used = driven.used
    if used and used.peak_bytes:
        figures["peak_memory_bytes"] = exact_figure(
            used.peak_bytes, "the service's processes under load, read from outside"
        )
    tokens = sum(a.tokens for a in driven.answers if a.answered)
    if used and used.energy_j is not None and tokens:
        figures["energy_j_per_token"] = exact_figure(
            used.energy_j / tokens, f"counters: {', '.join(used.energy_counters)}"
        )
    return figures


def _of(name: str, answer: Answer) -> float | None:
    """Return a metric of one answered request; of the gaps between tokens, that which 95 % of them do not exceed."""
    if name == "itl_s":
        return _rank(sorted(answer.gaps_s), 0.95) if answer.gaps_s else None
    value: float | None = getattr(answer, name)
    return value


def _bounds(limits: Sequence[Budget]) -> dict[str, float]:
    """Return what one request must keep: of each latency that has a limit, the laxest."""
    found: dict[str, float] = {}
    for limit in limits:
        if limit.metric in LATENCIES and limit.bound == "max" and not limit.relative and limit.level != "off":
            found[limit.metric] = max(limit.value, found.get(limit.metric, 0.0))
    return found


def _within(answer: Answer, bounds: Mapping[str, float]) -> bool:
    return all((value := _of(name, answer)) is None or value <= most for name, most in bounds.items())


def _rates(driven: Driven, events: Sequence[tuple[float, float]]) -> list[float]:
    """Return the amount for each second in each part of the counted time, of (when, how much)."""
    each_s = (driven.until_s - driven.from_s) / PARTS
    parts = [0.0] * PARTS
    for at_s, amount in events:
        if driven.from_s <= at_s < driven.until_s:
            parts[min(PARTS - 1, int((at_s - driven.from_s) / each_s))] += amount
    return [part / each_s for part in parts]


# ---------------------------------------------------------------- percentiles


def _percentiles(name: str, counted: Sequence[Answer], answered: Sequence[Answer], seed: int) -> dict[str, Percentile]:
    from planner.statistics import CONFIDENCE, QUANTILES, TAIL_CONFIDENCE, quantile_interval

    if name == "itl_s":
        if not any(a.gaps_s for a in answered):
            return {}
        told = {p: _gaps(answered, QUANTILES[p], seed) for p in PERCENTILES}
        return {p: Percentile(value=value, low=low, high=high) for p, (value, low, high) in told.items()}
    values = [v for a in answered if (v := _of(name, a)) is not None]
    if not values:
        return {}
    values = sorted([*values, *[math.inf] * (len(counted) - len(answered))])
    found = {}
    for p in PERCENTILES:
        confidence = CONFIDENCE if p == "p50" else 2 * TAIL_CONFIDENCE - 1
        low, high = quantile_interval(values, QUANTILES[p], confidence)
        value = statistics.median(values) if p == "p50" else _rank(values, QUANTILES[p])
        found[p] = Percentile(value=_finite(value), low=_finite(low), high=_finite(high))
    return found


def _gaps(answered: Sequence[Answer], q: float, seed: int) -> tuple[float, float, float]:
    """Return a percentile of all gaps between tokens with its interval: requests are resampled, each with its gaps."""
    import numpy

    gaps = [numpy.array(a.gaps_s) for a in answered if a.gaps_s]
    together = numpy.concatenate(gaps)
    every = max(1, len(together) // MOST_GAPS)
    gaps = [g[::every] for g in gaps]
    chance = numpy.random.default_rng(seed)
    drawn = [
        numpy.quantile(numpy.concatenate([gaps[i] for i in chance.integers(0, len(gaps), len(gaps))]), q)
        for _ in range(RESAMPLES)
    ]
    value = float(numpy.quantile(together, q))
    low, high = numpy.quantile(drawn, [0.025, 0.975])
    return value, min(float(low), value), max(float(high), value)


def _rank(ordered: Sequence[float], q: float) -> float:
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# ---------------------------------------------------------------- steady or not


def _unsteady(driven: Driven, counted: Sequence[Answer]) -> str:
    """Return why the figures are of no steady state, or an empty text."""
    if driven.stopped:
        return f"not steady: {driven.stopped}"
    if driven.scenario == "all at once" or len(counted) < 2 * PARTS:
        return ""
    if driven.scenario == "clients":
        return ""
    refused = sum(a.refused for a in counted)
    if refused > REFUSED * len(counted):
        return f"not steady: arrivals outrun the service, which refused {refused} of {len(counted)}"
    parts = under_way(driven.answers, driven.from_s, driven.until_s)
    first, last = sum(parts[:3]) / 3, sum(parts[-3:]) / 3
    if kendall(parts) < GROWS or last < MORE * first + 1:
        return ""
    seconds = driven.until_s - driven.from_s
    came = len(counted) / seconds
    left = sum(bool(a.answered) and driven.from_s <= a.token_s[-1] < driven.until_s for a in driven.answers) / seconds
    return (
        f"not steady: arrivals outrun the service. {units.format(came, 'requests')} came and "
        f"{units.format(left, 'requests')} were answered; {first:.0f} requests were under way at first, {last:.0f} at last"
    )


def under_way(answers: Sequence[Answer], from_s: float, until_s: float) -> list[float]:
    """Return the mean number of requests that were due and not yet answered, in each part of a time."""
    each_s = (until_s - from_s) / PARTS
    starts = [from_s + i * each_s for i in range(PARTS)]
    spans = [(a.due_s, a.token_s[-1] if a.answered else until_s) for a in answers if a.answered or not a.refused]
    return [sum(max(0.0, min(end, t + each_s) - max(due, t)) for due, end in spans) / each_s for t in starts]


def kendall(values: Sequence[float]) -> int:
    """Return how many more pairs rise than fall in time: Kendall's S, the trend test of Mann 1945."""
    return sum((b > a) - (b < a) for i, a in enumerate(values) for b in values[i + 1 :])


def _remarks(driven: Driven, counted: Sequence[Answer], answered: Sequence[Answer], problem: str) -> list[str]:
    from planner.statistics import minimal_samples

    found = [problem] if problem else []
    if failures := Counter(a.failure for a in counted if not a.answered):
        why, times = failures.most_common(1)[0]
        more = f", and {len(failures) - 1} other reasons" if len(failures) > 1 else ""
        found.append(
            f"{sum(failures.values())} of {len(counted)} requests were not answered: {times} times {why}{more}"
        )
    if short := sum(a.tokens < a.asked_tokens for a in answered):
        found.append(f"{short} answers were shorter than asked: the service ends them early")
    few = {
        p: n for p, n in (("95th", minimal_samples(0.95, 0)), ("99th", minimal_samples(0.99, 0))) if len(counted) < n
    }
    for percentile, needed in few.items():
        found.append(f"{len(counted)} requests: the {percentile} percentile has an upper bound from {needed} on")
    if not problem and driven.scenario != "all at once" and _drifts(driven, answered):
        found.append("latency rose or fell all the time: raise --warm-up or --duration")
    latencies = [a.latency_s for a in answered]
    if len(latencies) >= 2 * PARTS and (r := _with_the_next(latencies)) > ALIKE:
        found.append(f"requests were like those before them (correlation {r:.1f}): the intervals are too narrow")
    late_s = _rank(sorted(driven.late_s), 0.95) if driven.late_s else 0.0
    if late_s > LATE_S and driven.scenario != "all at once":
        found.append(
            f"the load generator itself was late: 95 % of requests within {units.format(late_s, 'time')} of their time"
        )
    if (used := driven.used) and used.generator_cores > SEVERAL:
        found.append(f"the load generator used {used.generator_cores:.1f} cores of the machine it measures")
    if (other := _crowd(driven)) is not None:
        found.append(f"other processes kept {other:.1f} cores busy: a quiet machine would do better")
    return found


def _drifts(driven: Driven, answered: Sequence[Answer]) -> bool:
    """Whether latencies went one way all through the load, by a fifth."""
    if len(answered) < 3 * PARTS:
        return False
    ordered = [a.latency_s for a in sorted(answered, key=lambda a: a.due_s)]
    size = len(ordered) // PARTS
    medians = [statistics.median(ordered[i * size : (i + 1) * size]) for i in range(PARTS)]
    return abs(kendall(medians)) >= GROWS and max(medians) > 1.2 * min(medians)


def _with_the_next(values: Sequence[float]) -> float:
    """Return the correlation of each value with the next."""
    try:
        return statistics.correlation(values[:-1], values[1:])
    except statistics.StatisticsError:  # all alike
        return 0.0


# ---------------------------------------------------------------- verdicts


def _crowd(driven: Driven) -> float | None:
    """Return the cores other programs kept busy, where they did: a service under load takes all cores by turns."""
    other = driven.used.other_cores if driven.used else None
    return other if other is not None and other > CROWDED_CORES else None


def _verdict(
    limit: Budget, percentiles: Mapping[str, Mapping[str, Percentile]], figures: Mapping[str, Figure], problem: str
) -> Verdict:
    """Return whether a limit is met: by the confidence bound, and never for a queue that grows."""
    figure = figures.get(limit.metric)
    told = percentiles.get(limit.metric, {}).get(limit.statistic)
    if told is None and figure is None:
        return Verdict(
            budget=limit, outcome="not judged", limit=limit.value, sentence=f"{limit.label}: nothing was measured"
        )
    if told is not None:
        value, low, high = told.value, told.low, told.high
    elif figure is not None:
        value, low, high = figure.value, figure.low, figure.high
    if limit.bound == "max":
        outcome = "met" if high is not None and high <= limit.value else "inconclusive"
        outcome = "not met" if (low is not None and low > limit.value) or value is None else outcome
    else:
        outcome = "met" if low is not None and low >= limit.value else "inconclusive"
        outcome = "not met" if high is not None and high < limit.value else outcome
    if problem and outcome == "met":
        outcome = "inconclusive"

    def show(x: float | None, none: str) -> str:
        return none if x is None else units.format(x, METRICS[limit.metric].dimension)

    sentence = (
        f"{limit.label} {show(value, 'not answered')} [{show(low, '?')}, {show(high, '?')}] "
        f"{WORDS[outcome, limit.bound]} {show(limit.value, '')}"
    )
    sentence += "; the load was not steady" if problem else ""
    return Verdict(budget=limit, outcome=outcome, limit=limit.value, sentence=sentence)
