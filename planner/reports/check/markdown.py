"""The comment on a pull request: the verdict first, then what failed, why, and what would fix it.

The hidden tag in the first line finds the comment again, so that one comment is kept up to date. Nothing in it links
anywhere, and of HTML it holds <details> and <summary> alone: whoever posts it can refuse everything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from knowledge_base.metrics import METRICS
from knowledge_base.types import Measurement
from planner.checking import RUN_TO_RUN, CheckResult, Stopped
from planner.lock import Lock
from planner.reports import _table
from planner.reports.check import _budget_table
from planner.reports.markdown import cut, escape
from planner.results import ParetoSet, PlanResult

CHECK = "Markdown, for a comment on a pull request"
LONGEST = 60_000  # characters; GitHub's API stops at 65,536
OPEN_ROWS = 8
PLANS = 50


def render(check: CheckResult | Stopped) -> str:
    """Return the comment, at most LONGEST characters; what had to be left out is named."""
    if isinstance(check, Stopped):
        text = f"### ⛔ leanplan: {cut(check.headline)}\n\n**Next** {cut(check.hint)}"
        return f"{tag(check)}\n{text}\n"
    parts = [(name, text) for name, part in PARTS.items() if (text := part(check))]
    text, left_out = f"{tag(check)}\n### {subject(check)}\n", []
    for name, part in parts:
        if len(text) + len(part) + 200 > LONGEST:
            left_out.append(name)
        else:
            text += f"\n{part}\n"
    if left_out:
        text += f"\nLeft out to stay below {LONGEST:,} characters: {', '.join(left_out)}. All of it: `leanplan check --json`\n"
    return text


def tag(check: CheckResult | Stopped) -> str:
    """Return the hidden line by which a comment is found again: by the spec's file, which is known even if it is bad."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", check.spec_file or check.name).strip("-")[:80]
    return f"<!-- leanplan:{name or 'check'} -->"


def worth_telling(check: CheckResult | Stopped, when: str) -> bool:
    """Return whether there is something to say: always, when it failed, or also when anything changed."""
    if when == "always" or isinstance(check, Stopped) or check.exit_code:
        return True
    moved = any(r.outcome in ("worse", "better") for r in check.regressions)
    return when == "changed" and (check.main is None or bool(check.changes) or moved)


def subject(check: CheckResult) -> str:
    """Return the verdict as the subject of an e-mail: what failed, by how much, against what."""
    errors = [v.outcome for v in check.verdicts if v.budget.level == "error"]
    missed, unsure = errors.count("not met"), len(errors) - errors.count("not met") - errors.count("met")
    worse = sum(r.outcome == "worse" for r in check.regressions)
    kind = "" if check.measured else " (predicted)"
    counts = [f"{missed} of {len(errors)} budgets not met"] if missed else []
    counts += [f"{worse} metric{'s' if worse > 1 else ''} worse than the lock"] if worse else []
    if counts:
        return f"❌ leanplan: {' and '.join(counts)}{kind}: {_budget_table.rows(check)[0].brief}"
    if unsure:
        first = _budget_table.rows(check)[0].brief
        return f"❔ leanplan: {unsure} of {len(errors)} budgets cannot be judged{kind}: {first}"
    better = [METRICS[r.metric].label for r in check.regressions if r.outcome == "better"]
    more = f", better than the lock: {', '.join(better)}" if better else ""
    return (
        f"✅ leanplan: all {len(errors)} budgets met{kind}{more or ('' if check.main else ', no lock to compare with')}"
    )


def _budgets(check: CheckResult) -> str:
    rows = _budget_table.rows(check)
    text = _budget_table.table(check, rows[:OPEN_ROWS])
    if rest := rows[OPEN_ROWS:]:
        outcomes = ", ".join(dict.fromkeys(row.status for row in rest))
        text += "\n\n" + _folded(f"… {len(rest)} more: {outcomes}", _budget_table.table(check, rest))
    return text if rows else ""


def _why(check: CheckResult) -> str:
    lines = [f"changed: {cut(c)}" for c in check.changes]
    for r in check.regressions:
        if abs(r.drift - 1) > RUN_TO_RUN:
            label = METRICS[r.metric].label
            lines.append(f"{label} of the unchanged model moved {r.drift - 1:+.0%} too: the machine, not the plan")
    measurement = check.result.measurement
    if measurement and measurement.warnings and check.exit_code:
        lines.append(f"measuring was not quiet: {cut('; '.join(dict.fromkeys(measurement.warnings)))}")
    if not lines and check.main and check.measured and check.exit_code:
        lines = ["nothing that is recorded: plan, model, workload, libraries and machine are the lock's. What is left: "
                 "another version of leanplan, or a busy machine (`leanplan doctor`)"]  # fmt: skip
    return _list("Why", lines)


def _settle(check: CheckResult) -> str:
    lines = []
    for verdict in check.verdicts:
        if verdict.outcome in ("met", "not met") or verdict.budget.level != "error":
            continue
        label, figure = verdict.budget.label, verdict.figure
        if not check.measured:
            advice = "measure it: `leanplan check` without `--predict`"
        elif figure is None:
            advice = "a machine or an engine that can measure it"
        elif verdict.outcome == "not judged":
            advice = "a machine that can measure it, or `source: any` in the budget"
        else:
            advice = "a quieter machine, or more `check.runs` in the spec; else a limit outside the interval"
        lines.append(f"{label}: {advice}. {cut(verdict.sentence)}")
    return _list("What would settle it", lines)


def _fix(check: CheckResult) -> str:
    if not any(v.outcome == "not met" and v.budget.level == "error" for v in check.verdicts):
        return ""
    fix = check.fix
    if fix is None:
        answer = check.predicted or check.answer
        lines = ["no plan is predicted to meet every budget", *(cut(c) for c in answer.conflicts[:4])]
        return _list("Fix that fits: none", lines)
    kind = "measured here" if fix.measurement else "predicted, not measured"
    figures = [
        f"{v.budget.label} {cut(_table.cell(fix, v.budget.metric, measured=bool(fix.measurement)))}"
        for v in fix.verdicts
        if v.budget.level == "error"
    ]
    text = f"**Fix that fits** ({kind}) `{fix.plan.id}` {cut(fix.plan.words)}: {', '.join(figures)}."
    return text if fix.measurement else f"{text} Measure it and lock it: `leanplan plan --lock`"


def _how(check: CheckResult) -> str:
    measurement, hardware = check.result.measurement, check.answer.hardware
    lines = [f"plan `{check.plan.id}`: {cut(check.plan.words)}"]
    lines.append(f"machine: {cut(hardware.name)}" + _same_machine(check.lock, hardware.fingerprint))
    if measurement is None:
        lines.append("nothing was run: figures are predicted, intervals hold 80 %")
    else:
        lines += _protocol(measurement)
    lines += [cut(note) for note in check.notes]
    return _folded("How measured" if measurement else "How predicted", "\n".join(f"- {line}" for line in lines))


def _same_machine(lock: Lock | None, fingerprint: str) -> str:
    if lock is None:
        return ""
    return (
        ", the same as the lock's"
        if lock.hardware_fingerprint == fingerprint
        else ", not the lock's: times are not compared"
    )


def _protocol(measurement: Measurement) -> list[str]:
    protocol = measurement.protocol
    timed = [figure.n for name, figure in measurement.figures.items() if METRICS[name].sampled]
    lines = [f"samples of each time: {max(timed, default=0)}"]
    if blocks := protocol.get("interleaved_blocks"):
        lines[0] += f", in {blocks} blocks interleaved with the unchanged model"
    lines += [f"{name}: {cut(str(protocol[name]))}" for name in ("seed", "data") if name in protocol]
    versions = ", ".join(f"{k} {v}" for k, v in sorted(measurement.versions.items()))
    lines += [f"versions: {cut(versions)}"] if versions else []
    return lines + [f"warning: {cut(w)}" for w in measurement.warnings]


def _plans(check: CheckResult) -> str:
    return "\n\n".join(_plan_table(a) for a in (check.answer, check.predicted) if a and len(a.results) > 1)


def _plan_table(answer: ParetoSet) -> str:
    names = _table.columns(answer)
    shown = _table.ordered(answer)
    rows = [f"| | id | plan | {' | '.join(_table.heading(n) for n in names)} |", "|---|---|---|" + "--:|" * len(names)]
    for result in shown[:PLANS]:
        cells = [escape(_table.cell(result, n, measured=answer.measured)) for n in names]
        rows.append(
            f"| {_table.mark(result, answer)} | {result.plan.id} | {_words(result, answer)} | {' | '.join(cells)} |"
        )
    more = f"\n\n{len(shown) - PLANS} more" if len(shown) > PLANS else ""
    kind = "measured" if answer.measured else "predicted"
    plans, budgets = _table.legend(answer)
    return _folded(f"All plans, {kind} ({len(shown)})", "\n".join(rows) + f"{more}\n\n{'; '.join(plans + budgets)}.")


def _words(result: PlanResult, answer: ParetoSet) -> str:
    return cut(result.plan.words) + (" (the model as it came)" if result is answer.baseline else "")


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"**{title}** {lines[0]}" if len(lines) == 1 else "\n".join([f"**{title}**", "", *(f"- {x}" for x in lines)])


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


PARTS: dict[str, Callable[[CheckResult], str]] = {
    "Budgets": _budgets, "Why": _why, "What would settle it": _settle, "Fix that fits": _fix, "How measured": _how,
    "All plans": _plans,
}  # fmt: skip
