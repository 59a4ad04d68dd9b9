"""JUnit XML of a check: a budget is a test case; not met is a failure, what could not be judged an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.sax.saxutils import escape, quoteattr

from planner.results import ParetoSet, Verdict

REPORT = "JUnit XML: one test case for each budget of the recommended plan"
SUFFIX = ".xml"


def render(answer: ParetoSet) -> str:
    """Return the recommended plan's verdicts (else the baseline's) as a JUnit test suite."""
    result = answer.recommended or answer.baseline
    return suite(answer.run_id, result.verdicts if result else ())


def suite(name: str, verdicts: Sequence[Verdict]) -> str:
    """Return verdicts as a JUnit test suite. Budgets of level warn never fail it: they are skipped with a message."""
    cases = []
    counts = {"failure": 0, "error": 0, "skipped": 0}
    for verdict in verdicts:
        label = _attribute(f"{verdict.budget.label} {verdict.budget.bound} {verdict.budget.text}".strip())
        head = f"  <testcase classname={_attribute(name)} name={label}"
        kind = None if verdict.outcome == "met" else "failure" if verdict.outcome == "not met" else "error"
        if kind and verdict.budget.level == "warn":
            kind = "skipped"
        if kind is None:
            cases.append(f"{head}><system-out>{_text(verdict.sentence)}</system-out></testcase>")
            continue
        counts[kind] += 1
        cases.append(
            f"{head}><{kind} message={_attribute(verdict.sentence)}>{_text(verdict.outcome)}</{kind}></testcase>"
        )
    totals = (
        f'tests="{len(cases)}" failures="{counts["failure"]}" errors="{counts["error"]}" skipped="{counts["skipped"]}"'
    )
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f"<testsuite name={_attribute(name)} {totals}>",
            *cases,
            "</testsuite>",
            "",
        ]
    )


def _clean(text: str) -> str:
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def _text(text: str) -> str:
    return escape(_clean(text))


def _attribute(text: str) -> str:
    return quoteattr(_clean(text))
