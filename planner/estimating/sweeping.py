"""One plan priced at many batches, loads, devices, contexts or lengths of answer: a table, a plot, and where it stops fitting."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeVar

from knowledge_base import units
from knowledge_base.errors import BadInput
from knowledge_base.metrics import METRICS
from knowledge_base.types import Plan, Step, Value, Workload
from planner.estimating.asking import Asked, with_devices
from planner.estimating.comparing import load_words
from planner.estimating.drawing import Curve, Picture, lines, svg
from planner.estimating.pricing import PEAK, Priced, price

Key = Literal["batch", "concurrency", "requests_per_s", "devices", "context", "output"]
Number = int | float
MOST = 64  # points of a sweep
MOST_TICKS = 12  # of them that are written along a plot
LARGEST = 10**9
COLUMNS = ("ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s", "requests_per_s", "kv_cache_bytes", PEAK)
LOADS = ("concurrency", "requests_per_s")  # keys under which requests wait, each differently long


@dataclass(frozen=True, slots=True)
class Swept:
    """What a key means: what it does to what is asked, which metric is worth a plot, and its words."""

    at: Callable[[Asked, Any], Asked]
    plotted: str
    words: str


def _batch(asked: Asked, count: int) -> Asked:
    if asked.by_law:
        raise BadInput(
            f"{asked.engine} forms its own batches", hint="sweep the clients: --sweep concurrency=1..64", where="--sweep batch"
        )  # fmt: skip
    if any(step.technique == "batch_size" for step in asked.steps):
        raise BadInput(
            "the plan has a batch already", hint="leave `--step batch_size` out, the sweep sets it", where="--sweep batch"
        )  # fmt: skip
    workload = replace(asked.workload, concurrency=max(count, asked.workload.concurrency))
    steps = (*asked.steps, Step("batch_size", {"count": count})) if count > 1 else asked.steps
    return replace(asked, steps=steps, workload=workload)


def _concurrency(asked: Asked, count: int) -> Asked:
    if asked.workload.requests_per_s is not None:
        raise BadInput(
            "clients at a time and requests that arrive are two loads", hint="leave --requests-per-s out", where="--sweep concurrency"
        )  # fmt: skip
    return replace(asked, workload=replace(asked.workload, concurrency=count))


def _requests_per_s(asked: Asked, rate: float) -> Asked:
    return replace(asked, workload=replace(asked.workload, requests_per_s=float(rate)))


def _devices(asked: Asked, count: int) -> Asked:
    hardware, device = asked.hardware, asked.hardware.device
    there = sum(d == device for d in hardware.devices)
    if there > 1 and not hardware.measured:  # `4x rtx-4090` is where a sweep may begin, or end
        price = hardware.price_usd_per_h
        hardware = replace(
            hardware, name=device.name, devices=(device,), host_memory_bytes=hardware.host_memory_bytes // there,
            price_usd_per_h=price and price / there,
        )  # fmt: skip
    return replace(asked, hardware=with_devices(hardware, count))


def _context(asked: Asked, tokens: int) -> Asked:
    prompt = tokens - asked.workload.output_tokens
    if prompt < 1:
        raise BadInput(
            f"a context of {tokens} tokens has no room for a prompt beside {asked.workload.output_tokens} output tokens",
            hint=f"begin at {asked.workload.output_tokens + 1} or lower --output-tokens", where=f"--sweep context={tokens}",
        )  # fmt: skip
    return replace(asked, workload=replace(asked.workload, prompt_tokens=prompt))


def _output(asked: Asked, tokens: int) -> Asked:
    return replace(asked, workload=replace(asked.workload, output_tokens=tokens))


KEYS: dict[Key, Swept] = {
    "batch": Swept(_batch, "throughput_tokens_per_s", "requests decoded together"),
    "concurrency": Swept(_concurrency, "throughput_tokens_per_s", "clients at a time"),
    "requests_per_s": Swept(_requests_per_s, "latency_s", "requests that arrive each second"),
    "devices": Swept(_devices, "throughput_tokens_per_s", "equal devices"),
    "context": Swept(_context, "tpot_s", "tokens of prompt and answer"),
    "output": Swept(_output, "latency_s", "tokens of an answer"),
}


class SweepPoint(TypedDict):
    """The plan at one value. Where it does not fit, only sizes and quality are told."""

    at: Number  # value of the key
    plan: Plan
    workload: Workload
    values: dict[str, Value]  # metric -> prediction
    fits: bool  # predicted peak memory is within the machine's limit
    falls_behind: bool  # more requests arrive than it can answer, so no time can be told
    memory_limit_bytes: float


class Sweep(TypedDict):
    """What is predicted of one plan as one thing grows."""

    model: str
    hardware: str
    words: str  # the plan that is swept, in words
    key: Key
    memory_limit_bytes: float  # at the first point
    coverage: float  # of the intervals
    notes: list[str]  # what must be known to read the figures
    points: list[SweepPoint]
    largest_that_fits: Number | None  # null: nothing in the sweep fits


def read_sweep(text: str) -> tuple[Key, list[int]]:
    """Return `read_numbers` of what can be swept here."""
    return read_numbers(text, KEYS)


Name = TypeVar("Name", bound=str)


def read_numbers(text: str, keys: Iterable[Name]) -> tuple[Name, list[Any]]:
    """Return the key and its values: `batch=1..64` doubles from 1 to 64, `batch=1,3,5` is as written.

    Raises:
        BadInput: an unknown key, or values that are no whole numbers from 1, in order.
    """
    name, equals, written = (part.strip() for part in text.partition("="))
    key: Name | None = next((key for key in keys if key == name), None)
    if key is None or not equals:
        raise BadInput(
            f"cannot sweep {units.quote(name)}" if equals else f"{units.quote(text)} does not say what to sweep",
            hint=f"one of: {', '.join(f'{key}=1..64' for key in keys)}", where="--sweep",
        )  # fmt: skip
    ends = re.fullmatch(r"(.*?)\.\.(.*)", written)
    read = _rate if key == "requests_per_s" else _whole
    numbers = [read(part, text) for part in ((ends[1], ends[2]) if ends else written.split(","))]
    if any(a >= b for a, b in itertools.pairwise(numbers)):
        raise BadInput(f"the values of {units.quote(text)} do not rise", hint="write them from small to large", where="--sweep")  # fmt: skip
    if ends:
        low, high = numbers
        numbers = [*(low * 2**i for i in range(math.ceil(math.log2(high / low)))), high]
    if len(numbers) > MOST:
        raise BadInput(f"{len(numbers)} values are too many to read", hint=f"at most {MOST}", where="--sweep")
    return key, numbers


def _rate(text: str, whole: str) -> float:
    stripped = text.strip()
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", stripped) or not float(stripped) > 0:
        raise BadInput(
            f"{units.quote(stripped)} in {units.quote(whole)} is not a rate above 0",
            hint="write for example requests_per_s=0.5..8", where="--sweep",
        )  # fmt: skip
    return float(stripped)


def _whole(text: str, whole: str) -> int:
    stripped = text.strip()
    if not re.fullmatch(r"[0-9]{1,10}", stripped) or not 1 <= int(stripped) <= LARGEST:
        raise BadInput(
            f"{units.quote(stripped)} in {units.quote(whole)} is not a whole number from 1 to {LARGEST:,}",
            hint="write for example batch=1..64, or batch=1,2,4", where="--sweep",
        )  # fmt: skip
    return int(stripped)


def swept(asked: Asked, key: Key, numbers: Sequence[Number]) -> Sweep:
    """Return the plan priced at every number.

    Raises:
        BadInput: a number the model or the plan cannot have; EnvironmentProblem: as `price`.
    """
    points = [_at(asked, key, number) for number in numbers]
    everywhere = [note for note in points[0].notes if all(note in priced.notes for priced in points)]
    return Sweep(
        model=asked.model.name, hardware=asked.hardware.name, words=asked.plan.words, key=key,
        memory_limit_bytes=float(points[0].limit_bytes), coverage=points[0].coverage, notes=everywhere,
        points=[_point(number, priced) for number, priced in zip(numbers, points)],
        largest_that_fits=_largest(asked, key, numbers, points),
    )  # fmt: skip


def _at(asked: Asked, key: Key, number: Number) -> Priced:
    changed = KEYS[key].at(asked, number)
    where = f"--sweep {key}={number}"
    changed.check(steps_from=where, lengths_from=where)
    try:
        return price(changed)
    except BadInput as error:
        raise BadInput(error.message, hint=error.hint, where=where) from error


def _point(number: Number, priced: Priced) -> SweepPoint:
    rate = priced.asked.workload.requests_per_s
    return SweepPoint(
        at=number, plan=priced.plan, workload=priced.asked.workload, values=priced.holding, fits=priced.fits,
        falls_behind=rate is not None and priced.fits and "latency_s" in priced.prevented, memory_limit_bytes=float(priced.limit_bytes),
    )  # fmt: skip


def _largest(asked: Asked, key: Key, numbers: Sequence[Number], points: Sequence[Priced]) -> Number | None:
    """Return the largest number within the sweep that fits; memory never falls as one of the whole keys grows."""
    fitting = [number for number, priced in zip(numbers, points) if priced.fits]
    if not fitting or len(fitting) == len(numbers) or key in ("devices", "requests_per_s"):
        return fitting[-1] if fitting else None
    low, high = int(fitting[-1]), int(numbers[len(fitting)])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _at(asked, key, middle).fits else (low, middle)
    return low


# ---------------------------------------------------------------- telling


def notes(facts: Sweep) -> list[str]:
    """Return what one must know to read the figures."""
    said = list(facts["notes"])
    limit = units.format(facts["memory_limit_bytes"], "bytes")
    if facts["largest_that_fits"] is None:
        said.append(f"nothing here fits in {limit}")
    elif facts["key"] == "devices" and not facts["points"][0]["fits"]:
        first = next(point for point in facts["points"] if point["fits"])
        said.append(f"fits from {first['at']} devices on")
    elif not all(point["fits"] for point in facts["points"]):
        said.append(f"fits in {limit} up to {facts['key']} {facts['largest_that_fits']}")
    if behind := [point["at"] for point in facts["points"] if point["falls_behind"]]:
        said.append(
            f"at {behind[0]:g} {'requests/s' if facts['key'] == 'requests_per_s' else facts['key']} it falls behind what arrives"
        )
    if facts["key"] == "batch":
        from knowledge_base.registry import techniques

        known = techniques.get("batch_size").TECHNIQUE.knobs["count"].options
        if any(point["at"] not in (1, *known) for point in facts["points"]):
            said.append(f"batch_size can be executed with {', '.join(map(str, known))}; other batches are priced only")
    return said


def as_text(facts: Sweep, *, ascii_only: bool) -> str:
    """Return the sweep as a table, notes and a plot."""
    from planner.cli.ls import table

    workload = facts["points"][0]["workload"]
    fixed: dict[Key, str] = {
        "context": f"{workload.output_tokens} output tokens",
        "output": f"{workload.prompt_tokens} prompt tokens",
    }
    lengths = fixed.get(facts["key"], f"{workload.prompt_tokens} prompt + {workload.output_tokens} output tokens")
    load = load_words(workload).partition("; ")[2]
    lengths += f"; {load}" if load and facts["key"] not in LOADS else ""
    rows = [_row(facts["key"], point) for point in facts["points"]]
    title = f"predicted for {facts['model']} on {facts['hardware']}  ({facts['words']})"
    out = [title, f"{lengths}; intervals hold {facts['coverage'] * 100:.0f} %", "", table(rows)]
    out += ["", *notes(facts)] if notes(facts) else []
    for picture in pictures(facts):
        out += ["", *lines(picture, ascii_only=ascii_only)]
    return "\n".join(out)


def _row(key: Key, point: SweepPoint) -> dict[str, str]:
    row: dict[str, str] = {key: f"{point['at']:g}" if key == "requests_per_s" else str(point["at"])}
    for name in COLUMNS:
        value = point["values"].get(name)
        row[METRICS[name].label] = units.format(value.mid, METRICS[name].dimension) if value else "–"
        if name == "latency_s" and key in LOADS:
            p95 = value.p95 if value else None
            row["p95"] = "–" if p95 is None else units.format(p95, "time")
    may = point["values"][PEAK].high <= point["memory_limit_bytes"]
    told = "falls behind" if point["falls_behind"] else "" if may else "may not fit"
    return {**row, "": told if point["fits"] else "does not fit"}


def as_svg(facts: Sweep) -> str:
    """Return the plots as an SVG."""
    return svg(f"{facts['model']} on {facts['hardware']}: {facts['words']}", pictures(facts), notes(facts))


def pictures(facts: Sweep) -> list[Picture]:
    """Return a plot of the metric that matters, as far as the plan fits, and one of memory with its limit."""
    return [p for p in (_plot(facts, KEYS[facts["key"]].plotted), _plot(facts, PEAK)) if p is not None]


def _plot(facts: Sweep, metric: str) -> Picture | None:
    from planner.reports.html._axes import Axis

    first, last = facts["points"][0]["at"], facts["points"][-1]["at"]

    def across(number: Number) -> float:
        return math.log(number / first) / math.log(last / first) if last > first else 0.5

    shown = [(point["at"], point["values"][metric]) for point in facts["points"] if metric in point["values"]]
    if not shown:
        return None
    limits = [facts["memory_limit_bytes"]] if metric == PEAK and facts["key"] != "devices" else []
    axis = Axis.of(metric, [*(end for _, value in shown for end in (value.low, value.high)), *limits])
    curves = [
        Curve(
            points=[(across(number), axis.at(value.mid)) for number, value in shown],
            band=[(axis.at(value.low), axis.at(value.high)) for _, value in shown],
            text=f"{METRICS[metric].label}, {facts['coverage'] * 100:.0f} % interval",
        )
    ]
    for limit in limits:
        at = axis.at(limit)
        curves.append(Curve(points=[(0.0, at), (1.0, at)], text=f"limit {units.format(limit, 'bytes')}", line="limit"))
    until = facts["largest_that_fits"]
    if until is not None and until < last and facts["key"] != "devices":
        at = across(until)
        curves.append(Curve(points=[(at, 0.0), (at, 1.0)], text=f"fits up to {until}", line="limit"))
    numbers = [point["at"] for point in facts["points"]]
    return Picture(
        title=METRICS[metric].label, across=f"{facts['key']} ({KEYS[facts['key']].words})",
        across_ticks=[(across(n), f"{n:g}" if n < 1e5 else str(n)) for n in numbers[:: math.ceil(len(numbers) / MOST_TICKS)]],
        up_ticks=axis.ticks(), curves=curves,
    )  # fmt: skip
