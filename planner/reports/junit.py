"""JUnit XML of a plan: a budget is a test case; not met is a failure, what could not be judged an error."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from planner.reports._text import literal
from planner.results import ParetoSet, Verdict
from planner.scrubbing import scrub

REPORT = "JUnit XML: one test case for each budget of the recommended plan"
SUFFIX = ".xml"


class Case(NamedTuple):
    """One test case. `kind` is "failure", "error" or "skipped"; None: it passed."""

    name: str
    kind: str | None
    message: str
    text: str = ""


def render(answer: ParetoSet) -> str:
    """Return the recommended plan's verdicts (else the baseline's) as a JUnit test suite."""
    result = answer.recommended or answer.baseline
    return suite(answer.run_id, cases(result.verdicts if result else ()))


def cases(verdicts: Sequence[Verdict]) -> list[Case]:
    """Return a case for each verdict. Budgets of level warn never fail a suite: they are skipped with a message."""
    found = []
    for verdict in verdicts:
        budget = verdict.budget
        kind = {"met": None, "not met": "failure"}.get(verdict.outcome, "error")
        if kind and budget.level == "warn":
            kind = "skipped"
        name = f"{budget.label} {budget.bound} {budget.text}".strip()
        found.append(Case(name, kind, verdict.sentence, verdict.outcome))
    return found


def suite(name: str, cases: Sequence[Case]) -> str:
    """Return a JUnit test suite of cases."""
    counts = Counter(case.kind for case in cases)
    totals = (
        f'tests="{len(cases)}" failures="{counts["failure"]}" errors="{counts["error"]}" skipped="{counts["skipped"]}"'
    )
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuite name={_attribute(name)} {totals}>"]
    for case in cases:
        if case.kind is None:
            inner = f"<system-out>{_text(case.message)}</system-out>"
        else:
            inner = f"<{case.kind} message={_attribute(case.message)}>{_text(case.text)}</{case.kind}>"
        lines.append(f"  <testcase classname={_attribute(name)} name={_attribute(case.name)}>{inner}</testcase>")
    return scrub("\n".join([*lines, "</testsuite>", ""]))


def _clean(text: str) -> str:
    return re.sub(r"[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", literal(text))


def _text(text: str) -> str:
    return escape(_clean(text))


def _attribute(text: str) -> str:
    return quoteattr(_clean(text))
