"""The scarcity view as text, Markdown and one HTML page: techniques down, resources across.

A cell has the survey's mark, direct ● or indirect ○ (`?`: the mark is hard to read in the source), and below it what
published figures say is left of the resource: ×0.41 (23) is 41 % at the median of 23 figures.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from knowledge_base.field.magnitude import Magnitude
from knowledge_base.field.matrix import Cell, Matrix, Row
from planner.reports.markdown import escape

MARKS = {"direct": "●", "indirect": "○", "": ""}
LEGEND = (
    "● direct, ○ indirect effect as the survey's Table 2 marks it (? hard to read there); ×0.41 (23): what is left of the "
    "resource at the median of 23 published figures, over models, machines and baselines that differ; no prediction"
)


def as_text(table: Matrix) -> str:
    """Return the matrix as aligned columns, one block for each group."""
    rows = [[row.name, *(_cell(row.cells[r]) for r in table.resources), _run(row)] for row in table.rows]
    head = ["technique", *table.resources, "run here"]
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        return "  ".join(text.ljust(width) for text, width in zip(cells, widths)).rstrip()

    lines = [line(head)]
    for group, members in groupby(zip(table.rows, rows, strict=True), key=lambda pair: pair[0].group):
        lines += ["", group, *(line(cells) for _, cells in members)]
    return "\n".join([table.title, "", *lines, "", LEGEND])


def as_markdown(table: Matrix) -> str:
    """Return the matrix as a Markdown table."""
    lines = [
        f"## {escape(table.title)}", "",
        f"| | technique | {' | '.join(table.resources)} | run here |",
        "|---|---|" + "---|" * (len(table.resources) + 1),
    ]  # fmt: skip
    before = ""
    for row in table.rows:
        cells = " | ".join(_cell(row.cells[r]) for r in table.resources)
        lines.append(
            f"| {escape(row.group) if row.group != before else ''} | {escape(row.name)} | {cells} | {_run(row)} |"
        )
        before = row.group
    return "\n".join([*lines, "", LEGEND])


def as_html(table: Matrix) -> str:
    """Return the matrix as one page that opens from disk and makes no request."""
    import jinja2

    from planner.reports.html import environment
    from planner.scrubbing import scrub

    templates = environment().overlay(loader=jinja2.FileSystemLoader(Path(__file__).parent))
    groups = [(name, list(rows)) for name, rows in groupby(table.rows, key=lambda row: row.group)]
    page = templates.get_template("matrix.html").render(
        table=table, groups=groups, marks=MARKS, legend=LEGEND, left=_left, run=_run, shade=_shade
    )
    return scrub(page) + "\n"


def _cell(cell: Cell) -> str:
    mark = MARKS[cell.strength] + ("?" if cell.uncertain else "")
    return f"{mark} {_left(cell.evidence)}".strip()


def _left(said: Magnitude | None) -> str:
    return f"×{said.factor:.2g} ({said.rows})" if said else ""


def _run(row: Row) -> str:
    return f"{row.executable} of {row.methods}"


def _shade(said: Magnitude | None) -> int:
    """Return how strongly a cell is tinted, 0 to 4: a step for each halving of what is left."""
    import math

    return 0 if said is None or said.factor >= 1 else min(4, 1 + int(-math.log2(said.factor)))
