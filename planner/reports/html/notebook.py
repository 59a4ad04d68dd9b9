"""An answer as a notebook shows it: the sentence and the plans worth looking at, as one small table."""

from __future__ import annotations

from planner.reports import _table
from planner.results import ParetoSet

MOST_PLANS, MOST_COLUMNS = 12, 5


def render(answer: ParetoSet) -> str:
    """Return the sentence and a table as a piece of HTML: styled by itself, nothing in it runs."""
    from planner.reports.html import environment
    from planner.reports.html._view import View

    view = View.of(answer)
    names = view.columns[:MOST_COLUMNS]
    lines = [
        {"row": row, "cells": [_table.cell(row.result, n, measured=answer.measured) for n in names]} for row in view.shown
    ]  # fmt: skip
    return (
        environment()
        .get_template("notebook.html")
        .render(
            view=view, answer=answer, headings=[_table.heading(n) for n in names], lines=lines[:MOST_PLANS],
            more=max(0, len(lines) - MOST_PLANS),
        )
    )  # fmt: skip
