"""`leanplan explain`: why a plan is where it is, why something else is not, or what is known and measured of a technique."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Annotated, Any, TypedDict

HELP = (
    "why a plan was chosen or not: what each step bought and cost, which budget bound; or what is known of a technique, "
    "and what it changed on this machine"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plan", nargs="?", default="recommended",
        help="start of a plan id, `recommended` (default), `baseline`, or a technique: leanplan ls techniques",
    )  # fmt: skip
    parser.add_argument("--run", help="run folder or name (default: the newest that has the plan)")
    parser.add_argument("--why-not", metavar="TECHNIQUE|PLAN", help="why this one is not the recommended plan")
    parser.add_argument("--budget", metavar="METRIC", help="how every measured plan stands to one budget")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json is the same as --json")


class WhyNot(TypedDict):
    """Why a technique or plan is not the recommended plan."""

    why_not: str
    reasons: list[str]


def output() -> Any:
    from knowledge_base.field.card import Card
    from planner.measured_effects import MeasuredEffect
    from planner.results import PlanResult, Verdict
    from planner.schemas import Beside

    explained = Annotated[Card, Beside("Explained", measured=list[MeasuredEffect])]
    return PlanResult | WhyNot | list[Verdict] | explained


def run(options: argparse.Namespace) -> int:
    from knowledge_base.metrics import find_metric
    from planner.cli._talk import emit
    from planner.finding import find_plan, find_run, runs_root

    root = runs_root(options)
    options.json = options.json or options.format == "json"
    if _is_technique(options.plan):
        _explain_technique(options)
        return 0
    if options.budget:
        answer = find_run(options.run, root)
        metric, _ = find_metric(options.budget)
        verdicts = [(r, v) for r in answer.results for v in r.verdicts if v.budget.metric == metric.name]
        lines = [f"{v.outcome:13} {r.plan.id}  {v.sentence}  ({r.plan.words})" for r, v in verdicts]
        emit(options, [v for _, v in verdicts], "\n".join(lines) or f"no budget on {metric.label} in this run")
        return 0
    if options.why_not:
        answer = find_run(options.run, root)
        lines = why_not(answer, options.why_not)
        emit(options, WhyNot(why_not=options.why_not, reasons=lines), "\n".join(lines))
        return 0
    answer, result = find_plan(options.plan, root, options.run)
    role = (
        "recommended"
        if result.plan.id == answer.recommended_id
        else "on the Pareto front"
        if result.on_front
        else "not on the front"
    )
    lines = [f"{result.plan.id}  {result.plan.words}", f"{role} of {answer.run_id}", ""]
    lines += [f"- {why}" for why in result.why]
    lines += [f"{v.outcome}: {v.sentence}" for v in result.verdicts]
    if result.measurement and result.measurement.failure:
        failure = result.measurement.failure
        lines.append(f"failed in {failure.stage}: {failure.kind}: {failure.message}")
    emit(options, result, "\n".join(lines))
    return 0


def _explain_technique(options: argparse.Namespace) -> None:
    """Print what is published of a method, and what it changed where it was measured on this machine."""
    from knowledge_base.field.card import card
    from knowledge_base.serde import plain
    from planner.cli._talk import emit
    from planner.machine import this_fingerprint
    from planner.measured_effects import effects_of
    from planner.reports.knowledge import card as published
    from planner.reports.knowledge import measured
    from planner.store import Store

    found = card(options.plan)
    effects: tuple[Any, ...] = ()
    if found.techniques:
        records = Store(Path(options.store or ".leanplan")).records(this_fingerprint())
        effects = effects_of(found.techniques, records)
    text = published.as_text(found, measured.as_lines(effects, found.techniques))
    emit(options, {**plain(found), "measured": effects}, text)


def _is_technique(text: str) -> bool:
    """Whether a name is a technique's rather than a plan's: plan ids are hex digits."""
    from knowledge_base.field import field

    return text in field().methods or not re.fullmatch(r"[0-9a-f]+|recommended|baseline", text)


def why_not(answer, text: str) -> list[str]:  # type: ignore[no-untyped-def]
    """Return the reasons a technique or plan is not in the recommended plan."""
    best = answer.recommended
    if best and any(s.technique == text for s in best.plan.steps):
        return [f"{text} is in the recommended plan {best.plan.id}"]
    lines = [f"{r.what}: {r.why}" for r in answer.rejected if text in r.what]
    for result in answer.results:
        if not (result.plan.id.startswith(text) or any(s.technique == text for s in result.plan.steps)):
            continue
        if result.measurement and result.measurement.failure:
            lines.append(
                f"{result.plan.words}: {result.measurement.failure.kind}: {result.measurement.failure.message}"
            )
            continue
        beyond = [v.sentence for v in result.verdicts if v.outcome == "not met"]
        if beyond:
            lines.append(f"{result.plan.words}: {'; '.join(beyond)}")
        elif best and result.plan.id != best.plan.id:
            from planner.answering import value_of

            first = answer.objectives[0]
            ours, theirs = value_of(best, first), value_of(result, first)
            lines.append(
                f"{result.plan.words}: meets the budgets, but {first} is {theirs:.4g} against {ours:.4g} of {best.plan.id}"
            )
    return lines or [f"{text} is legal here, but no plan with it was predicted good enough to be measured in this run"]
