"""What one step changed by measurements on this machine: a plan with it against the same plan without it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from knowledge_base.types import Figure, Plan, Step, Workload
from planner.judging import crowding
from planner.store import Record

COMPARED = ("artefact_bytes", "peak_memory_bytes", "perplexity", "ttft_s", "tpot_s", "throughput_tokens_per_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRatio:
    """A figure with the step over the figure without it: `value` in between `low` and `high`, 1 is no change."""

    value: float
    low: float  # of the worst case that both figures' intervals allow; of perplexity, paired over held-out windows
    high: float
    n: int  # samples behind it: of the figure that has fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEffect:
    """What one step changed, all else equal. `against` is of another engine where the unchanged model ran on none else."""

    step: str  # with its knobs
    beside: tuple[str, ...]  # the other steps of both plans; none: the unchanged model
    engine: str
    against: str  # the plan without it
    model: str
    params: int  # of the model
    prompt_tokens: int
    output_tokens: int
    ratios: Mapping[str, MeasuredRatio]  # by metric
    crowded: bool  # other programs kept the machine busy meanwhile: ratios of times mean little
    taken_at: str  # the later of the two measurements, UTC


def effects_of(names: Collection[str], records: Iterable[Record]) -> tuple[MeasuredEffect, ...]:
    """Return what steps of some techniques changed, alone first, the newest first.

    Only figures of one model, workload, held-out text and one set of library versions are compared. Of the same pair
    measured again, the newest counts.
    """
    good = [r for r in records if r.measurement.failure is None]
    good.sort(key=lambda record: record.measurement.taken_at)
    plans = {(_context(r), r.measurement.plan): r for r in good}
    unchanged = {(r.measurement.plan.engine, *_load(r)) for r in good if not r.measurement.plan.steps}
    # An engine may have run nothing without the step: GGUF formats are compared with the model as it came on another.
    as_it_came = {_load(r): r for r in good if not r.measurement.plan.steps}
    found = {}
    for record in good:
        for step, fewer in _without(record.measurement.plan, names):
            before = plans.get((_context(record), fewer))
            if before is None and not fewer.steps and (fewer.engine, *_load(record)) not in unchanged:
                before = as_it_came.get(_load(record))
            if before is not None:
                found[record.measurement.plan, step, *_load(record)[:2]] = _effect(step, before, record)
    newest = sorted(found.values(), key=lambda effect: effect.taken_at, reverse=True)
    return tuple(sorted(newest, key=lambda effect: len(effect.beside)))


def _without(plan: Plan, names: Collection[str]) -> Iterator[tuple[Step, Plan]]:
    """Yield each step of those techniques with the plan that is left without it."""
    for step in plan.steps:
        if step.technique in names:
            rest = tuple(other for other in plan.steps if other != step)
            yield step, Plan(model_digest=plan.model_digest, engine=plan.engine, steps=rest)


def _load(record: Record) -> tuple[str, Workload, str]:
    """Return what figures of two engines must share to be compared."""
    return record.model.digest, record.workload, str(record.measurement.protocol.get("data", ""))


def _context(record: Record) -> tuple[object, ...]:
    """Return what figures of one engine must share to be compared."""
    return (*_load(record), tuple(sorted(record.measurement.versions.items())))


def _effect(step: Step, before: Record, after: Record) -> MeasuredEffect:
    old, new = before.measurement, after.measurement
    pairs = {
        name: (old.figures[name], new.figures[name]) for name in COMPARED if name in old.figures and name in new.figures
    }
    ratios = {name: ratio for name, pair in pairs.items() if (ratio := _ratio(name, *pair)) is not None}
    return MeasuredEffect(
        step=str(step), beside=tuple(str(s) for s in old.plan.steps), engine=new.plan.engine, against=old.plan.words,
        model=after.model.name, params=after.model.params_total, prompt_tokens=after.workload.prompt_tokens,
        output_tokens=after.workload.output_tokens, ratios=ratios, crowded=any(crowding(m) for m in (old, new)),
        taken_at=max(old.taken_at, new.taken_at),
    )  # fmt: skip


def _ratio(metric: str, before: Figure, after: Figure) -> MeasuredRatio | None:
    """Return the ratio of two figures, or None where they cannot be compared."""
    if metric == "perplexity":
        return _of_losses(before, after)
    if before.low <= 0:
        return None
    return MeasuredRatio(
        value=after.value / before.value, low=after.low / before.high, high=after.high / before.low,
        n=min(before.n, after.n),
    )  # fmt: skip


def _of_losses(before: Figure, after: Figure) -> MeasuredRatio | None:
    """Return the ratio of perplexities, whose samples are the losses of the same windows; None where they are not."""
    from planner.statistics import mean_figure

    if len(before.samples) != len(after.samples) or not before.samples:
        return None
    differences = [b - a for a, b in zip(before.samples, after.samples)]
    mean = mean_figure(differences, seed=0)
    value, low, high = (math.exp(min(x, 700.0)) for x in (mean.value, mean.low, mean.high))
    return MeasuredRatio(value=value, low=low, high=high, n=len(differences))
