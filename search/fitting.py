"""Settings made for the budgets of a problem: the gentlest ones of a technique that are predicted to meet them.

A technique whose knob may have any value says so with `RANGE = {metric: (knob, (gentlest, ..., harshest))}`: which knob is
turned for a budget of which metric. Its `knobs` are the few settings that are always considered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from knowledge_base.registry import techniques
from knowledge_base.types import Budget, Hardware, Model, Plan, Step, Workload
from search.placing import placed
from search.space import Space


def with_fitted(space: Space, model: Model, workload: Workload, hardware: Hardware, budgets: Sequence[Budget]) -> Space:
    """Return the space with more settings of each technique that has a RANGE: for each budget, and for all of them at once.

    What is left out of memory is also set as the placement program has it, with the batch (placing.py).
    They meet them alone, as predicted; with other steps beside them, they are strengths more to choose from.
    """
    asked = [budget for budget in budgets if budget.level != "off"]

    def fitted(engine: str, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        def gentlest(start: Step, knob: str, values: Sequence[float], budget: Budget) -> Step | None:
            settings = [Step(start.technique, {**start.knobs, knob: value}) for value in values]
            legal = [setting for setting in settings if not _illegal(setting, model, workload, hardware)]
            return _gentlest(engine, legal, knob, budget, model, workload, hardware)

        found = [step for start in _starts(steps) for step in _turned(start, asked, gentlest)]
        return tuple(step for step in dict.fromkeys(found) if step not in steps)

    options = {
        engine: {family: steps + fitted(engine, steps) for family, steps in families.items()}
        for engine, families in space.options.items()
    }
    for engine, families in options.items():
        for family, step in placed(engine, families, model, workload, hardware, asked):
            families[family] = tuple(dict.fromkeys((*families[family], step)))
    return replace(space, options=options)


def _starts(steps: Sequence[Step]) -> list[Step]:
    """Return a step for each setting of the knobs that are not turned, the turned ones at their defaults where they may be."""
    found: dict[tuple, tuple[int, Step]] = {}
    for step in steps:
        module = techniques.get(step.technique)
        if turned := {knob for knob, _ in getattr(module, "RANGE", {}).values()}:
            key = (step.technique, tuple(sorted((k, v) for k, v in step.knobs.items() if k not in turned)))
            moved = sum(step.knobs[knob] != module.TECHNIQUE.knobs[knob].default for knob in turned)
            if key not in found or moved < found[key][0]:
                found[key] = moved, step
    return [step for _, step in found.values()]


def _turned(start: Step, budgets: Sequence[Budget], gentlest: Callable[..., Step | None]) -> list[Step]:
    """Return the step turned until it meets each of the budgets, and all of them."""
    ranges = techniques.get(start.technique).RANGE
    asked = [(*ranges[budget.metric], budget) for budget in budgets if budget.metric in ranges]
    together = start
    for turn in asked:
        together = gentlest(together, *turn) or together
    return [step for step in (*(gentlest(start, *turn) for turn in asked), together) if step is not None]


def _illegal(step: Step, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    legal = getattr(techniques.get(step.technique), "legal", lambda *_: None)
    return legal(step.knobs, model, workload, hardware)


def _gentlest(
    engine: str,
    settings: Sequence[Step],
    turned: str,
    budget: Budget,
    model: Model,
    workload: Workload,
    hardware: Hardware,
) -> Step | None:
    """Return the first setting that is predicted to meet a budget; None: no one, or it takes none.

    A `speedup` is held to by measuring, whatever is predicted: it must ask for all the speed that is lacking.
    """
    import cost_models

    plans = [
        Plan(model_digest=model.digest, engine=engine, steps=steps)
        for steps in ((), *((setting,) for setting in settings))
    ]
    figures = cost_models.estimate_many(plans, model, workload, hardware)
    if budget.metric not in figures:
        return None
    unchanged, *predicted = figures[budget.metric].mid
    limit = budget.value * unchanged if budget.relative else budget.value
    sign = 1 if budget.bound == "max" else -1
    if sign * unchanged <= sign * limit:
        return None
    for setting, value in zip(settings, predicted):
        fast = max(unchanged, limit) <= setting.knobs[turned] * min(unchanged, limit) if turned == "speedup" else True
        if fast and sign * value <= sign * limit:
            return setting
    return None
