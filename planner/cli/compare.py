"""`leanplan compare A B`: two plans, two runs (their recommended plans) or two lock files."""

from __future__ import annotations

import argparse
from typing import Any

HELP = "compare two plans, runs or lock files, figure by figure with intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(
            name, help="start of a plan id, `baseline`, `recommended`, a run folder or name, or a lock file"
        )


def run(options: argparse.Namespace) -> int:
    from knowledge_base import units
    from knowledge_base.metrics import METRICS
    from planner.cli._talk import emit
    from planner.cli.ls import table

    (name_a, a, machine_a), (name_b, b, machine_b) = (figures(options, text) for text in (options.a, options.b))
    rows: list[dict[str, Any]] = []
    for metric in METRICS.values():
        if metric.name not in a or metric.name not in b:
            continue
        x, y = a[metric.name], b[metric.name]
        apart = x.high < y.low or y.high < x.low
        better = (y.value < x.value) == (metric.better == "lower")
        rows.append(
            {
                "metric": metric.label,
                "a": f"{units.format(x.value, metric.dimension)} [{units.format(x.low, metric.dimension)}, {units.format(x.high, metric.dimension)}]",
                "b": f"{units.format(y.value, metric.dimension)} [{units.format(y.low, metric.dimension)}, {units.format(y.high, metric.dimension)}]",
                "b / a": f"{y.value / x.value:.3f}" if x.value else "–",
                "verdict": ("b is better" if better else "a is better") if apart else "cannot be told apart",
            }
        )
    notes = [f"a: {name_a}", f"b: {name_b}"]
    if machine_a != machine_b:
        notes.append("measured on different machines: times are not comparable, sizes and quality are")
    emit(
        options,
        {"a": name_a, "b": name_b, "same_machine": machine_a == machine_b, "rows": rows},
        "\n".join(notes) + "\n\n" + table(rows),
    )
    return 0


def figures(options: Any, text: str) -> tuple[str, Any, str]:
    """Return (words, figures by metric, machine fingerprint) of a plan, a run's recommended plan, or a lock file.

    Raises:
        BadInput: nothing is called that, or it has no measured figures.
    """
    from pathlib import Path

    from knowledge_base.errors import BadInput
    from planner.finding import find_plan, find_run, runs_root

    if Path(text).is_file():
        from planner.lock import read_lock

        lock = read_lock(Path(text))
        return f"{lock.plan.words} ({text})", lock.figures, lock.hardware_fingerprint
    root = runs_root(options)
    try:
        answer, result = find_plan(text, root)
    except BadInput as not_a_plan:
        try:
            answer = find_run(text, root)
        except BadInput:
            raise not_a_plan from None
        if answer.recommended is None:
            raise BadInput(f"run `{text}` recommends no plan", hint="name a plan of it: leanplan ls plans") from None
        result = answer.recommended
    if result.measurement is None or result.measurement.failure:
        raise BadInput(f"plan {result.plan.id} has no measured figures", hint="leanplan explain " + result.plan.id)
    return f"{result.plan.words} ({answer.run_id})", result.measurement.figures, answer.hardware.fingerprint
