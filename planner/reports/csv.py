"""One row for each plan, for a spreadsheet: numbers in base units, text that no spreadsheet takes for a formula."""

from __future__ import annotations

import re

from knowledge_base.metrics import METRICS
from planner.cli._talk import clean
from planner.results import ParetoSet, PlanResult

REPORT = "CSV, one row for each plan"
SUFFIX = ".csv"
# A cell that starts like this is computed when the file is opened in a spreadsheet.
_FORMULA = re.compile(r"\s*[=+\-@|%]|[\t\n]")


def render(answer: ParetoSet) -> str:
    """Return a header and one row for each plan: measured figures with their interval, predictions beside them."""
    import csv
    import io

    names = [n for n in METRICS if any(n in _measured(r) or n in _predicted(r) for r in answer.results)]
    head = ["id", "plan", "engine", "recommended", "on_front", "feasible", "failure"]
    for name in names:
        head += [name, f"{name}.low", f"{name}.high", f"{name}.source", f"{name}.predicted"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for result in answer.results:
        writer.writerow([_cell(value) for value in _row(result, answer, names)])
    return out.getvalue()


def _row(result: PlanResult, answer: ParetoSet, names: list[str]) -> list[object]:
    failure = result.measurement.failure if result.measurement else None
    row: list[object] = [
        result.plan.id, result.plan.words, result.plan.engine, result.plan.id == answer.recommended_id, result.on_front,
        result.feasible and failure is None, f"{failure.kind}: {failure.message}" if failure else "",
    ]  # fmt: skip
    for name in names:
        figure, value = _measured(result).get(name), _predicted(result).get(name)
        row += [figure.value, figure.low, figure.high, figure.source] if figure else [""] * 4
        row.append(value.mid if value else "")
    return row


def _cell(value: object) -> object:
    """Return a value as it may stand in a cell: foreign text is marked as text where it could be a formula."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, str):
        return value
    text = clean(value)
    return f"'{text}" if _FORMULA.match(text) else text


def _measured(result: PlanResult):  # type: ignore[no-untyped-def]
    return result.measurement.figures if result.measurement and not result.measurement.failure else {}


def _predicted(result: PlanResult):  # type: ignore[no-untyped-def]
    return result.estimate.values if result.estimate else {}
