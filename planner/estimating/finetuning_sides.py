"""Two ways of training side by side, and one way as its batch, sequence, rank or number of devices grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

from knowledge_base.errors import BadInput
from knowledge_base.types import Value
from planner.estimating.asking import with_devices
from planner.estimating.finetuning import FineTuned, Tuning, finetuned
from planner.estimating.finetuning_told import does_not_fit, figures, interval
from planner.estimating.sweeping import read_numbers

Key = Literal["batch", "sequence", "rank", "devices"]


class FineTunedRow(TypedDict):
    """One figure of both."""

    figure: str
    a: Value
    b: Value
    ratio: float  # b / a


class FineTunedSides(TypedDict):
    """Two ways of training one model in one place. Figures beside memory hold only where both fit."""

    a: FineTuned
    b: FineTuned
    rows: list[FineTunedRow]


class FineTunedPoint(TypedDict):
    """The way of training at one value."""

    at: int
    fits: bool
    peak_memory_bytes: Value
    step_s: Value
    tokens_per_s: Value
    total_s: Value
    cost_usd: Value | None


class FineTunedSweep(TypedDict):
    """One way of training as one thing grows."""

    model: str
    hardware: str
    words: str
    key: Key
    memory_limit_bytes: float
    points: list[FineTunedPoint]


def compared(a: Tuning, b: Tuning) -> FineTunedSides:
    """Return two ways of training that `check` let pass."""
    one, other = finetuned(a), finetuned(b)
    there = {label: value for label, value, _ in figures(other)}
    rows = [
        FineTunedRow(figure=label, a=value, b=there[label], ratio=there[label].mid / value.mid)
        for label, value, _ in figures(one)
        if label in there
    ]
    return FineTunedSides(a=one, b=other, rows=rows)


def sides_as_text(facts: FineTunedSides) -> str:
    """Return the two as a table for people."""
    from planner.cli.ls import table

    a, b = facts["a"], facts["b"]
    dimensions = {label: dimension for label, _, dimension in figures(a)}
    rows = [
        {
            "figure": row["figure"], "a": interval(row["a"], dimensions[row["figure"]]),
            "b": interval(row["b"], dimensions[row["figure"]]), "b / a": f"{row['ratio']:.2f}",
        }
        for row in facts["rows"]
    ]  # fmt: skip
    lines = [
        f"predicted for fine-tuning {a['model']} on {a['hardware']}; intervals hold 80 %",
        f"a: {a['words']}", f"b: {b['words']}", "", table(rows),
    ]  # fmt: skip
    for name, side in (("a", a), ("b", b)):
        lines += [] if side["fits"] else ["", f"{name} {does_not_fit(side)}; its times hold only where it does"]
    return "\n".join(lines)


# ---------------------------------------------------------------- one thing grows


@dataclass(frozen=True, slots=True)
class Grown:
    """What a key means: what it does to what is asked, and its words."""

    at: Callable[[Tuning, int], Tuning]
    words: str


def _devices(tuning: Tuning, count: int) -> Tuning:
    if len(tuning.devices) > 1 or (tuning.parallel is not None and set(tuning.parallel) - {"zero"}):
        raise BadInput(
            "the sweep sets the number of devices", hint="name one device, and of --parallel at most zero",
            where="--sweep devices",
        )  # fmt: skip
    machine = with_devices(tuning.machines[0], count)
    return replace(tuning, machines=(machine,), parallel={**(tuning.parallel or {}), "data": count})


KEYS: dict[Key, Grown] = {
    "batch": Grown(lambda tuning, n: replace(tuning, batch=n), "sequences a device takes at once"),
    "sequence": Grown(lambda tuning, n: replace(tuning, sequence_tokens=n), "tokens of a sequence"),
    "rank": Grown(lambda tuning, n: replace(tuning, rank=n), "of the adapters"),
    "devices": Grown(_devices, "data ranks"),
}


def read_sweep(text: str) -> tuple[Key, list[int]]:
    """Return the key and its values: `batch=1..64` doubles, `batch=1,3,5` is as written.

    Raises:
        BadInput: an unknown key, or values that are no whole numbers from 1, in order.
    """
    return read_numbers(text, KEYS)


def swept(tuning: Tuning, key: Key, numbers: Sequence[int]) -> FineTunedSweep:
    """Return the way of training priced at every number.

    Raises:
        BadInput: a number it cannot have.
    """
    points = []
    for number in numbers:
        changed = KEYS[key].at(tuning, number)
        changed.check()
        facts = finetuned(changed)
        points.append(
            FineTunedPoint(
                at=number, fits=facts["fits"], peak_memory_bytes=facts["peak_memory_bytes"], step_s=facts["step_s"],
                tokens_per_s=facts["tokens_per_s"], total_s=facts["total_s"], cost_usd=facts["cost_usd"],
            )
        )  # fmt: skip
    return FineTunedSweep(
        model=tuning.model.name, hardware=", ".join(machine.name for machine in tuning.machines), words=tuning.words, key=key,
        memory_limit_bytes=facts["memory_limit_bytes"], points=points,
    )  # fmt: skip


def sweep_as_text(facts: FineTunedSweep) -> str:
    """Return the sweep as a table."""
    from planner.cli.ls import table

    rows = [
        {
            facts["key"]: str(p["at"]), "peak memory": interval(p["peak_memory_bytes"], "bytes"),
            "step": interval(p["step_s"], "time"), "throughput": interval(p["tokens_per_s"], "tokens_per_s"),
            "whole run": interval(p["total_s"], "time"),
            "money": interval(p["cost_usd"], "usd") if p["cost_usd"] else "–",
            "": "" if p["fits"] else "does not fit",
        }
        for p in facts["points"]
    ]  # fmt: skip
    title = f"predicted for fine-tuning {facts['model']} on {facts['hardware']}  ({facts['words']})"
    return "\n".join([title, f"{facts['key']}: {KEYS[facts['key']].words}; intervals hold 80 %", "", table(rows)])
