"""Two plans, or one plan on two machines, side by side: each figure with its interval, and how many times as much b is."""

from __future__ import annotations

import math
import re
from typing import Literal, TypedDict

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Hardware, Plan, Value, Workload
from planner.estimating.pricing import Priced, does_not_fit

Verdict = Literal["a is better", "b is better", "cannot be told apart", "equal"]


class Side(TypedDict):
    """One of the two."""

    plan: Plan
    words: str  # the plan in words
    hardware: str
    fits: bool  # predicted peak memory is within the machine's limit
    coverage: float  # of the intervals
    notes: list[str]  # what must be known to read the figures


class PredictedDifference(TypedDict):
    """One metric of both."""

    metric: str  # a name in leanplan ls metrics, with its unit
    a: Value
    b: Value
    ratio: float | None  # b / a; null where a or b is not above 0
    ratio_low: (
        float | None
    )  # from the intervals of both, the two errors taken as independent: what both share makes it narrower
    ratio_high: float | None  # the other end of it
    verdict: Verdict  # cannot be told apart: the interval of the ratio holds 1


class SideBySide(TypedDict):
    """What is predicted of two plans, or of one on two machines."""

    model: str
    workload: Workload
    a: Side
    b: Side
    rows: list[
        PredictedDifference
    ]  # of figures that hold on both sides: sizes and quality alone where one does not fit
    not_predicted: dict[str, str]  # metric -> why, of a or b


def compared(a: Priced, b: Priced) -> SideBySide:
    """Return the data of two priced plans of one model and workload."""
    unlike = _unlike_money(a.asked.hardware, b.asked.hardware)
    return SideBySide(
        model=a.asked.model.name, workload=a.asked.workload, a=_side(a), b=_side(b),
        rows=[
            _difference(name, a.holding[name], b.holding[name])
            for name in METRICS
            if name in a.holding and name in b.holding and name not in unlike
        ],
        not_predicted={name: p.message for side in (b, a) for name, p in side.prevented.items()} | unlike,
    )  # fmt: skip


def _unlike_money(a: Hardware, b: Hardware) -> dict[str, str]:
    """Return why money is not compared, where one machine's holds what the other's leaves out."""
    from cost_models.terms.cost_usd_per_token import QUANTITY, basis

    of_a, of_b = basis(a), basis(b)
    if of_a == of_b:
        return {}
    return {QUANTITY: f"a is {of_a}, b is {of_b}: give both machines' files price_usd_per_h, or both `bought`"}


def _side(priced: Priced) -> Side:
    return Side(
        plan=priced.plan, words=priced.plan.words, hardware=priced.asked.hardware.name, fits=priced.fits,
        coverage=priced.coverage, notes=list(priced.notes),
    )  # fmt: skip


def _difference(metric: str, a: Value, b: Value) -> PredictedDifference:
    ratio = low = high = None
    better: Verdict = "b is better" if (b.mid < a.mid) == (METRICS[metric].better == "lower") else "a is better"
    if min(a.low, b.low) > 0:
        ratio = b.mid / a.mid
        low = ratio * math.exp(-math.hypot(math.log(a.high / a.mid), math.log(b.mid / b.low)))
        high = ratio * math.exp(math.hypot(math.log(a.mid / a.low), math.log(b.high / b.mid)))
        apart = high < 1 or low > 1
    else:
        apart = a.high < b.low or b.high < a.low
    verdict: Verdict = "equal" if a == b else better if apart else "cannot be told apart"
    return PredictedDifference(metric=metric, a=a, b=b, ratio=ratio, ratio_low=low, ratio_high=high, verdict=verdict)


def as_text(facts: SideBySide, a: Priced, b: Priced) -> str:
    """Return the two as a table for people."""
    from planner.cli.ls import table

    workload = facts["workload"]
    lines = [
        f"predicted for {facts['model']}; {load_words(workload)}",
        *(f"{name}: {side['words']} on {side['hardware']}" for name, side in (("a", facts["a"]), ("b", facts["b"]))),
        f"{_coverage(facts)}; the ratio's takes the errors of a and b as independent: what they share makes it narrower",
        *(f"{name}: {note}" for name, side in (("a", facts["a"]), ("b", facts["b"])) for note in side["notes"]),
        "",
        table([_words(row) for row in facts["rows"]]),
    ]
    told = dict.fromkeys(f"{METRICS[name].label}: not predicted: {why}" for name, why in facts["not_predicted"].items())
    lines += ["", *told] if told else []
    for name, priced in (("a", a), ("b", b)):
        lines += [] if priced.fits else ["", f"{name} {does_not_fit(priced)}; times, energy and money are not compared"]
    return "\n".join(lines)


def _coverage(facts: SideBySide) -> str:
    shares = dict.fromkeys(f"{side['coverage']:.0%}".replace("%", " %") for side in (facts["a"], facts["b"]))
    return f"intervals hold {' (a) and '.join(shares)}{' (b)' if len(shares) > 1 else ''}"


def load_words(workload: Workload) -> str:
    """Return the lengths of a request, and how many come: `128 prompt + 64 output tokens; 8 clients at a time`."""
    lengths = f"{workload.prompt_tokens} prompt + {workload.output_tokens} output tokens"
    if workload.requests_per_s is not None:
        return f"{lengths}; {units.format(workload.requests_per_s, 'requests')} arrive by chance"
    return lengths if workload.concurrency == 1 else f"{lengths}; {workload.concurrency} clients at a time"


def _words(row: PredictedDifference) -> dict[str, str]:
    metric = METRICS[row["metric"]]
    a, b = _interval(row["a"], metric.dimension), _interval(row["b"], metric.dimension)
    ratio = "–"
    if row["ratio"] is not None:
        ratio = f"{row['ratio']:.2f} [{row['ratio_low']:.2f} – {row['ratio_high']:.2f}]"
    return {"metric": metric.label, "a": a, "b": b, "b / a": ratio, "verdict": row["verdict"]}


def _interval(value: Value, dimension: str) -> str:
    """Return a value with its interval, the unit only once where all three have the same: `86.2 [52.6 – 141] ms`."""
    texts = [units.format(v, dimension) for v in (value.mid, value.low, value.high)]
    split = [re.fullmatch(r"(-?\$?)([0-9.e+-]+)(.*)", text) for text in texts]
    if all(split) and len({(m[1], m[3]) for m in split if m}) == 1:
        before, after = split[0][1], split[0][3]  # type: ignore[index]
        mid, low, high = (m[2] for m in split if m)
        return f"{before}{mid} [{low} – {high}]{after}"
    return f"{texts[0]} [{texts[1]} – {texts[2]}]"
