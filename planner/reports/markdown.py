"""Markdown for a pull request, a wiki or a README. Foreign text is escaped."""

from __future__ import annotations

import re

from planner.reports import _table
from planner.results import ParetoSet
from planner.scrubbing import scrub

REPORT = "Markdown"
SUFFIX = ".md"
LONGEST_TEXT = 600  # characters of one foreign text in a comment


def escape(text: str) -> str:
    """Return foreign text that Markdown shows as it is: no table, code, HTML, mention, reference or link comes of it.

    Credentials are scrubbed first: once escaped, no scrub finds them. A backslash does not keep GitHub from making a
    link of `@name`, `#123` or an address, so a zero-width space does.
    """
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", " ", scrub(text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")
    text = re.sub(r"([\\|`*_\[\]~])", r"\\\1", text)
    return re.sub(r"(@(?=\w)|(?<!&)#(?=\d)|GH-(?=\d)|:(?=//)|www(?=\.))", r"\1&#8203;", text)


def cut(text: str) -> str:
    """Return foreign text escaped and of bounded length."""
    text = scrub(text)
    return escape(text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…")


def render(answer: ParetoSet) -> str:
    """Return the whole answer as Markdown."""
    names = _table.columns(answer)
    kind = "measured" if answer.measured else "predicted"
    lines = [f"## {escape(answer.sentence)}", ""]
    lines += [f"- {escape(c)}" for c in answer.conflicts]
    lines += [
        f"{escape(answer.model.name)} on {escape(answer.hardware.name)}; all figures {kind}.", "",
        "| | id | plan | " + " | ".join(_table.heading(n) for n in names) + " |",
        "|---|---|---|" + "--:|" * len(names),
    ]  # fmt: skip
    for result in _table.ordered(answer):
        cells = [_table.cell(result, name, measured=answer.measured) for name in names]
        who = escape(result.plan.words) + (" (the model as it came)" if result is answer.baseline else "")
        lines.append(f"| {_table.mark(result, answer)} | {result.plan.id} | {who} | " + " | ".join(cells) + " |")
    plans, budgets = _table.legend(answer)
    lines += ["", f"{'; '.join(plans + budgets)}.", ""]
    if answer.recommended:
        lines += [f"### Why {answer.recommended.plan.id}", ""]
        lines += [f"- {escape(why)}" for why in answer.recommended.why]
        lines += [f"- {_table.MARKS[v.outcome]} {escape(v.sentence)}" for v in answer.recommended.verdicts] + [""]
    failures = [r for r in answer.results if r.measurement and r.measurement.failure]
    if failures or answer.rejected:
        lines += ["### Not chosen", ""]
        for result in failures:
            failure = result.measurement.failure  # type: ignore[union-attr]
            lines.append(f"- {escape(result.plan.words)}: failed, {failure.kind}: {escape(failure.message)}")  # type: ignore[union-attr]
        lines += [
            f"- {escape(r.what)}{f' ({r.count} plans)' if r.count > 1 else ''}: {escape(r.why)}"
            for r in answer.rejected
        ] + [""]
    if answer.prediction_errors:
        lines += [
            "### Predicted against measured",
            "",
            "| metric | plans | median error | interval held |",
            "|---|--:|--:|--:|",
        ]
        lines += [
            f"| {_table.label(metric)} | {int(e['n'])} | {e['median_abs_ratio']:.0%} | {e['coverage']:.0%} |"
            for metric, e in answer.prediction_errors.items()
        ] + [""]
    if answer.unmeasured:
        lines += ["### Worth measuring, predicted to be better", ""]
        for result in answer.unmeasured:
            told = ", ".join(f"{_table.label(n)} {_table.value_text(v, n)}" for n, v in _table.foretold(answer, result))
            lines.append(f"- {result.plan.id} {escape(result.plan.words)}: {escape(told)}")
        lines.append("")
    if answer.forecast:
        heading, told_lines = _table.forecast_lines(answer.forecast)
        lines += [f"### {heading}", "", *(f"- {escape(line)}" for line in told_lines), ""]
    return "\n".join(lines)
