"""Screen 6: what must hold. The budgets, each with what is predicted to be reachable."""

from __future__ import annotations

import re
from typing import Any

from knowledge_base import units
from knowledge_base.errors import BadInput
from knowledge_base.metrics import find_metric
from knowledge_base.types import Budget
from planner import spec as specs
from planner.forecast import Outlook
from planner.wizard.answers import Answers
from planner.wizard.screens._screen import Grid, Screen, View
from planner.wizard.screens._typed import unknown

METRICS_SHOWN = (
    "ttft_p50", "tpot_p50", "latency_p50", "throughput_p50", "peak_memory", "artefact_size", "energy", "cost", "quality_loss",
)  # fmt: skip


def _grid(view: View) -> Grid:
    budgets = {b.label: b for b in view.answers.parsed.budgets}
    rows: list[tuple[str, ...]] = []
    chosen = set()
    for label in dict.fromkeys((*METRICS_SHOWN, *budgets)):
        metric, _ = find_metric(label)
        budget, outlook = budgets.get(label), view.outlook
        limit = f"{'≤' if budget.bound == 'max' else '≥'} {budget.text}" if budget else "–"
        if budget:
            chosen.add(len(rows))
        if outlook is None or metric.name not in outlook.unchanged.values:
            rows.append((label, "?", limit, "?", ""))
            continue
        reach = outlook.reach(metric.name)
        rows.append(
            (
                label,
                units.format(outlook.unchanged.values[metric.name].mid, metric.dimension, digits=2),
                limit,
                units.format(reach.value, metric.dimension, digits=2) if reach else "nothing",
                light(outlook, budget) if budget else "",
            )
        )
    return Grid(headings=("metric", "unchanged", "your limit", "reachable", ""), rows=rows, chosen=frozenset(chosen))


def light(outlook: Outlook, budget: Budget) -> str:
    """Return ✓ where some plan is predicted to keep the budget beside the others, ? where only its interval tells, ✗."""
    limit, reach = outlook.limit(budget), outlook.reach(budget.metric)
    if limit is None or budget.metric not in outlook.priced.figures:
        return "?"
    if reach is None:
        return "✗"
    sign = 1 if budget.bound == "max" else -1
    ends = sorted(sign * end for end in (reach.low, reach.high))
    if ends[1] <= sign * limit:
        return "✓"
    return "?" if sign * reach.value <= sign * limit else "✗"


def _change(view: View, text: str) -> Answers:
    label, _, value = text.replace("<=", " ").replace(">=", " ").replace(":", " ").partition(" ")
    if label not in specs.labels():
        raise unknown(label, [*METRICS_SHOWN])
    metric, statistic = find_metric(label)
    bound = "max" if metric.better == "lower" else "min"
    label = Budget(metric=metric.name, statistic=statistic, bound=bound, value=0.0).label
    value, warn = re.subn(r"\s+warn$", "", " ".join(value.split()))
    value = value.removeprefix(f"{bound} ")
    if not value:
        raise BadInput(
            f"`{label}` needs a limit", hint=f"type `{label} {specs.example_limit(metric)}`, or `{label} none`"
        )
    if value == "none":
        return view.answers.with_key(f"budgets.{label}", None)
    if value == "tightest":
        value = _tightest(view, metric.name, label)
    limit: dict[str, Any] = {bound: value}
    if warn:
        limit["level"] = "warn"
    if metric.resource in ("energy", "money") and view.outlook and not view.outlook.hardware.energy_counters:
        limit["source"] = "any"  # nothing measures energy there: the modelled figure has to count
    return view.answers.with_key(f"budgets.{label}", limit)


def _tightest(view: View, metric: str, label: str) -> str:
    budget = Budget(metric=metric, statistic="mean", bound="max", value=0.0)
    found = view.outlook.tightest(budget) if view.outlook else None
    if found is None:
        raise BadInput(f"nothing is predicted for {label} beside the other limits", hint="loosen one of them first")
    return found


def contradictions(view: View) -> list[str]:
    """Return what cannot hold together, each with the tightest limit that could."""
    if view.outlook is None:
        return []
    lines = []
    for budget in view.outlook.contradictions():
        limit = f"{budget.label} {'≤' if budget.bound == 'max' else '≥'} {budget.text}"
        tightest = view.outlook.tightest(budget)
        why = "is out of reach" if budget in view.outlook.impossible else "clashes with your other limits"
        lines.append(f"✗ {limit} {why}" + (f"; tightest: `{budget.label} {tightest}`" if tightest else ""))
    if not lines and view.outlook.best is None:
        lines.append(f"✗ no plan is predicted to fit {units.format(view.outlook.memory_bytes, 'bytes')} of memory")
    return lines


SCREEN = Screen(
    name="budgets",
    title="What must hold?",
    why="Only what you type becomes a budget; a plan has to keep all of them.",
    ask="e.g. `ttft_p95 200 ms`, `tpot 0.5x baseline`, `tpot tightest`, `tpot none`",
    grid=_grid,
    change=_change,
    remarks=contradictions,
    words=tuple(specs.labels()),
    more="`reachable` is the best predicted figure of any plan that keeps your other limits. ✓ predicted to hold, "
    "? too close to tell before measuring, ✗ beyond every plan. Add `warn` to a limit that should only warn. "
    "Statistics: ttft_p95, ttft_mean. `leanplan ls metrics` explains every metric.",
)
