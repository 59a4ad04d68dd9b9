"""A table for people at a terminal, as wide as it is; plain ASCII where the encoding asks for it."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

from knowledge_base.metrics import find_metric
from planner.cli._talk import clean
from planner.reports import _table
from planner.results import ParetoSet

REPORT = "a table for the terminal"
SUFFIX = ".txt"
NARROW = 80  # columns below which plans are listed as blocks
REJECTED = 8  # lines of what was not chosen
_ASCII = str.maketrans(
    {
        "◆": ">", "★": "*", "●": "o", "○": ".", "▲": "^", "×": "x", "■": "#", "✓": "+", "✗": "!", "–": "-", "↓": "v", "↑": "^", "±": "~", "≤": "<",
        "≥": ">", "…": ".", "▸": ">", "·": ",", "µ": "u", "━": "=", "╸": "-", "│": "|", "└": "+", "─": "-",
    }
)  # fmt: skip


def ascii_only(stream: Any) -> bool:
    """Return whether a stream takes ASCII alone: by its encoding, or because the person asked for the C locale."""
    locale = next((value for name in ("LC_ALL", "LC_CTYPE", "LANG") if (value := os.environ.get(name))), "")
    return locale in ("C", "POSIX") or "utf" not in (getattr(stream, "encoding", None) or "ascii").lower()


def in_ascii(text: str) -> str:
    """Return text with our marks as ASCII, and `?` for whatever else there is."""
    return text.translate(_ASCII).encode("ascii", errors="replace").decode()


def render(answer: ParetoSet, *, width: int | None = None, color: bool = False) -> str:
    """Return the answer, the table of plans, the reasons of the recommended one, and what was not chosen."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    plain = ascii_only(sys.stdout)
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
        return Text(in_ascii(value) if plain else value, style=style)

    kind = "measured" if answer.measured else "predicted, nothing was run"
    console.print(text(answer.sentence, "bold"))
    for conflict in answer.conflicts:
        console.print(text("  " + conflict))
    names = _table.columns(answer)
    # Objectives and budgets always have a column; the others where the plan's words keep room to be read.
    asked = {find_metric(o)[0].name for o in answer.objectives} | {b.metric for b in answer.budgets}
    names = names[: max(len(asked), (columns - 64) // 17)]
    title = f"{answer.model.name} on {answer.hardware.name} ({kind})"
    table = Table(title=text(title), box=_box(plain), expand=False)
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
            table.add_row(*(text(cell, style) for cell in (mark, result.plan.id, who, *cells)))
    if columns >= NARROW:
        console.print(table)
    for marks in filter(None, _table.legend(answer)):
        console.print(text("   ".join(marks)))
    if others := _table.named(answer):
        console.print(text("\nAlternatives:", "bold"))
        for name, other in others:
            words = f"{other.plan.id} {other.plan.words}"
            console.print(text(f"  {name}: {'the recommended plan' if other is answer.recommended else words}"))
    if answer.recommended:
        console.print(text(f"\nWhy {answer.recommended.plan.id}:", "bold"))
        for why in answer.recommended.why:
            console.print(text(f"  - {why}"))
        for verdict in answer.recommended.verdicts:
            console.print(text(f"  {_table.MARKS[verdict.outcome]} {verdict.sentence}"))
    failures = [r for r in answer.results if r.measurement and r.measurement.failure]
    if failures:
        mark = _table.KINDS["failed"].mark
        console.print(text("\nFailed:", "bold"))
        for result in failures:
            failure = result.measurement.failure  # type: ignore[union-attr]
            console.print(text(f"  {mark} {result.plan.words}: {failure.kind}: {failure.message}"))  # type: ignore[union-attr]
    if answer.rejected:
        console.print(text("\nNot chosen, the most frequent first:", "bold"))
        for rejection in (most := sorted(answer.rejected, key=lambda r: -r.count))[:REJECTED]:
            times = f" ({rejection.count:,}×)" if rejection.count > 1 else ""
            console.print(text(f"  - {rejection.what}{times}: {rejection.why}"))
        if len(most) > REJECTED:
            console.print(text(f"  … and {len(most) - REJECTED} more in result.json"))
    if answer.prediction_errors:
        console.print(text("\nPredicted against measured (before each was measured):", "bold"))
        for metric, error in answer.prediction_errors.items():
            console.print(
                text(
                    f"  {_table.label(metric)}: median error {error['median_abs_ratio']:.0%}, interval held {error['coverage']:.0%} of {int(error['n'])}"
                )
            )
    if answer.unmeasured:
        console.print(text("\nWorth measuring, predicted to be better:", "bold"))
        for result in answer.unmeasured:
            told = ", ".join(f"{_table.label(n)} {_table.value_text(v, n)}" for n, v in _table.foretold(answer, result))
            console.print(text(f"  {result.plan.id} {result.plan.words}: {told}  ({'; '.join(result.why)})"))
    if answer.forecast:
        heading, lines = _table.forecast_lines(answer.forecast)
        console.print(text(f"\n{heading}:", "bold"))
        for line in lines:
            console.print(text(f"  {line}"))
    if commands := _next(answer):
        console.print(text("\nNext:", "bold"))
        for command, what in commands:
            console.print(text(f"  {command}  ({what})"))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _next(answer: ParetoSet) -> list[tuple[str, str]]:
    """Return what one may do with a measured answer: commands, and what they give."""
    import shlex

    if not answer.measured or answer.recommended is None:
        return []
    plan, run = answer.recommended.plan.id, Path(answer.folder or answer.run_id)
    elsewhere = f" --run-dir {shlex.quote(str(run.parent))}" if answer.folder and run.parent != Path("runs") else ""
    program = _program()
    if "replanned_from" in answer.provenance:
        return [
            (f"{program} build {plan} -o artefact{elsewhere}", "its artefact, ready to serve"),
            (f"{program} plan SPEC", "with these budgets: what was measured is not measured again"),
        ]
    return [
        (f"{program} explain {plan}{elsewhere}", "what each of its steps bought and cost"),
        (f"{program} build {plan} -o artefact{elsewhere}", "its artefact, ready to serve"),
        (f"{program} report {shlex.quote(str(run))}", "one HTML file with every plan and chart"),
    ]


def _program() -> str:
    """Return how leanplan is typed here: by its name where the shell finds it, else by the path it was started with."""
    import shlex
    import shutil

    started = Path(sys.argv[0])
    return shlex.quote(sys.argv[0]) if started.name == "leanplan" and not shutil.which("leanplan") else "leanplan"


def _box(plain: bool):  # type: ignore[no-untyped-def]
    from rich import box

    return box.ASCII if plain else box.SIMPLE_HEAD


def _terminal_columns() -> int:
    import shutil

    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size((120, 24)).columns
    return 200  # a file or a pipe: no reason to fold
