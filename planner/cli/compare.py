"""`leanplan compare A B`: two plans, two runs (their recommended plans) or two lock files."""

from __future__ import annotations

import argparse
from typing import Any, Literal, TypedDict

from knowledge_base.types import Figure

HELP = "compare two plans, runs or lock files, figure by figure with intervals"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("a", "b"):
        parser.add_argument(
            name, help="start of a plan id, `baseline`, `recommended`, a run folder or name, or a lock file"
        )


Verdict = Literal["a is better", "b is better", "cannot be told apart"]


class Difference(TypedDict):
    """One metric of both."""

    metric: str  # a name in leanplan ls metrics, with its unit
    a: Figure
    b: Figure
    ratio: float | None  # b / a; null where a is 0
    verdict: Verdict  # cannot be told apart: the intervals overlap


class Comparison(TypedDict):
    """What was measured of two plans."""

    a: str
    b: str
    same_machine: bool  # if not, times are not comparable, sizes and quality are
    rows: list[Difference]


def output() -> Any:
    return Comparison


def run(options: argparse.Namespace) -> int:
    from knowledge_base.metrics import METRICS
    from planner.cli._talk import emit
    from planner.cli.ls import table

    (name_a, a, machine_a), (name_b, b, machine_b) = (figures(options, text) for text in (options.a, options.b))
    rows = [_difference(name, a[name], b[name]) for name in METRICS if name in a and name in b]
    notes = [f"a: {name_a}", f"b: {name_b}"]
    if machine_a != machine_b:
        notes.append("measured on different machines: times are not comparable, sizes and quality are")
    emit(
        options,
        Comparison(a=name_a, b=name_b, same_machine=machine_a == machine_b, rows=rows),
        "\n".join(notes) + "\n\n" + table([_in_words(row) for row in rows]),
    )
    return 0


def _difference(metric: str, a: Figure, b: Figure) -> Difference:
    from knowledge_base.metrics import METRICS

    better: Verdict = "b is better" if (b.value < a.value) == (METRICS[metric].better == "lower") else "a is better"
    return Difference(
        metric=metric, a=a, b=b, ratio=b.value / a.value if a.value else None,
        verdict=better if a.high < b.low or b.high < a.low else "cannot be told apart",
    )  # fmt: skip


def _in_words(row: Difference) -> dict[str, str]:
    from knowledge_base import units
    from knowledge_base.metrics import METRICS

    metric = METRICS[row["metric"]]

    def words(figure: Figure) -> str:
        value, low, high = (units.format(v, metric.dimension) for v in (figure.value, figure.low, figure.high))
        return f"{value} [{low}, {high}]"

    ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3f}"
    a, b = words(row["a"]), words(row["b"])
    return {"metric": metric.label, "a": a, "b": b, "b / a": ratio, "verdict": row["verdict"]}


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
