"""A table for people at a terminal, as wide as it is; plain ASCII where the encoding asks for it."""

from __future__ import annotations

import io
import os
import sys

from knowledge_base.metrics import find_metric
from planner.cli._talk import clean
from planner.reports import _table
from planner.results import ParetoSet

REPORT = "a table for the terminal"
SUFFIX = ".txt"
NARROW = 80  # columns below which plans are listed as blocks
_ASCII = str.maketrans(
    {
        "★": "*",
        "●": "o",
        "○": ".",
        "×": "x",
        "✓": "+",
        "✗": "!",
        "–": "-",
        "↓": "v",
        "↑": "^",
        "±": "~",
        "≤": "<",
        "…": ".",
    }
)


def render(answer: ParetoSet, *, width: int | None = None, color: bool = False) -> str:
    """Return the answer, the table of plans, the reasons of the recommended one, and what was not chosen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    ascii_only = "utf" not in (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    columns = _terminal_columns() if width is None else width
    console = Console(
        file=out,
        width=max(20, columns),
        force_terminal=color,
        color_system="standard" if color else None,
        legacy_windows=False,
    )

    def text(value: str, style: str = "") -> Text:
        value = clean(value)  # names come from strangers: nothing in them may steer the terminal
        return Text(value.translate(_ASCII) if ascii_only else value, style=style)

    kind = "measured" if answer.measured else "predicted, nothing was run"
    console.print(text(answer.sentence, "bold"))
    for conflict in answer.conflicts:
        console.print(text("  " + conflict))
    names = _table.columns(answer)
    # Objectives and budgets always have a column; the others where the plan's words keep room to be read.
    asked = {find_metric(o)[0].name for o in answer.objectives} | {b.metric for b in answer.budgets}
    names = names[: max(len(asked), (columns - 64) // 17)]
    title = f"{answer.model.name} on {answer.hardware.name} ({kind})"
    table = Table(title=text(title), box=_box(ascii_only), expand=False)
    for heading in ("", "id", "plan"):
        table.add_column(text(heading), overflow="fold", min_width=34 if heading == "plan" and columns > 100 else None)
    for name in names:
        table.add_column(text(_table.heading(name)), justify="right", overflow="fold")
    if columns < NARROW:
        console.print(text(title))
    for result in _table.ordered(answer):
        cells = [_table.cell(result, name, measured=answer.measured) for name in names]
        style = "bold" if result.plan.id == answer.recommended_id else "" if result.on_front else "dim"
        who = result.plan.words + ("  (the model as it came)" if result is answer.baseline else "")
        mark = _table.mark(result, answer)
        if columns < NARROW:  # a block for each plan where a table would be a column of letters
            console.print(text(f"{mark} {result.plan.id} {who}", style))
            for name, cell in zip(names, cells):
                console.print(text(f"    {_table.heading(name)} {cell}", style))
        else:
            table.add_row(*(text(c, style) for c in (mark, result.plan.id, who, *cells)))
    if columns >= NARROW:
        console.print(table)
    console.print(
        text(
            "★ recommended   ● on the Pareto front   ○ measured, dominated   ✓ budget met   ✗ not met   ? cannot be told"
        )
    )
    if answer.recommended:
        console.print(text(f"\nWhy {answer.recommended.plan.id}:", "bold"))
        for why in answer.recommended.why:
            console.print(text(f"  - {why}"))
        for verdict in answer.recommended.verdicts:
            console.print(text(f"  {_table.MARKS[verdict.outcome]} {verdict.sentence}"))
    failures = [r for r in answer.results if r.measurement and r.measurement.failure]
    if failures:
        console.print(text("\nFailed:", "bold"))
        for result in failures:
            failure = result.measurement.failure  # type: ignore[union-attr]
            console.print(text(f"  × {result.plan.words}: {failure.kind}: {failure.message}"))  # type: ignore[union-attr]
    if answer.rejected:
        console.print(text("\nNot chosen:", "bold"))
        for rejection in answer.rejected[:12]:
            times = f" ({rejection.count}×)" if rejection.count > 1 else ""
            console.print(text(f"  - {rejection.what}{times}: {rejection.why}"))
        if len(answer.rejected) > 12:
            console.print(text(f"  … and {len(answer.rejected) - 12} more in result.json"))
    if answer.prediction_errors:
        console.print(text("\nPredicted against measured (before each was measured):", "bold"))
        for metric, error in answer.prediction_errors.items():
            console.print(
                text(
                    f"  {metric}: median error {error['median_abs_ratio']:.0%}, interval held {error['coverage']:.0%} of {int(error['n'])}"
                )
            )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _box(ascii_only: bool):  # type: ignore[no-untyped-def]
    from rich import box

    return box.ASCII if ascii_only else box.SIMPLE_HEAD


def _terminal_columns() -> int:
    import shutil

    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size((120, 24)).columns
    return 200  # a file or a pipe: no reason to fold
