"""What is wrong, as forges show it: one finding for each budget or metric, on a line of the spec, worst first."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from knowledge_base.metrics import METRICS
from knowledge_base.serde import digest
from planner.checking import CheckResult, Stopped
from planner.reports._text import literal
from planner.results import Verdict

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong. `rule` names it the same way in every run; `level` is one of LEVELS."""

    rule: str
    level: str
    title: str
    message: str
    path: str
    line: int = 1

    @property
    def fingerprint(self) -> str:
        """32 hex digits that stay when the line or the figure moves: a forge knows the finding again."""
        return digest([self.rule, self.path])[:32]


def findings(check: CheckResult | Stopped) -> list[Finding]:
    """Return what is wrong, worst first; empty when every budget is met and nothing regressed."""
    if isinstance(check, Stopped):
        return [_stopped(check)]
    path = check.spec_file
    found = []
    for verdict in sorted(check.verdicts, key=severity):
        if verdict.outcome == "met":
            continue
        budget = verdict.budget
        wrong = verdict.outcome == "not met"
        level = LEVELS[(0 if wrong else 1) + (budget.level == "warn")]
        title = f"{budget.label} {verdict.outcome}"
        message = literal(verdict.sentence) + ("" if wrong else ": could not be judged")
        rule = f"budget/{budget.label}/{budget.bound}"
        found.append(Finding(rule=rule, level=level, title=title, message=message, path=path, line=budget.line or 1))
    lines = {v.budget.metric: v.budget.line for v in check.verdicts}
    for regression in check.regressions:
        if regression.outcome == "worse":
            label = METRICS[regression.metric].label
            found.append(
                Finding(
                    rule=f"regression/{label}", level="error", title=f"{label} worse than the lock",
                    message=literal(regression.sentence), path=path, line=lines.get(regression.metric) or 1,
                )
            )  # fmt: skip
    return sorted(found, key=lambda f: LEVELS.index(f.level))


def severity(verdict: Verdict) -> tuple[int, float]:
    """Return a sort key: what fails the check before what cannot be judged, only warns, or is met; the worst first."""
    from planner.answering import slack

    outcome = {"not met": 0, "inconclusive": 1, "not judged": 1, "met": 3}[verdict.outcome]
    return (2 if outcome < 2 and verdict.budget.level == "warn" else outcome), slack(verdict) or 0.0


def place(path: str | Path) -> str:
    """Return a path as forges name files: from the root of the repository, with slashes."""
    root = Path(os.environ.get("GITHUB_WORKSPACE") or os.environ.get("CI_PROJECT_DIR") or ".").resolve()
    whole = Path(path).resolve()
    return (whole.relative_to(root) if whole.is_relative_to(root) else whole).as_posix()


def locate(where: str | None) -> str | None:
    """Return where an error is, with a file named as forges name it: `leanplan.lock`, `leanplan.yaml:14`."""
    found = re.match(r"(.+?)(:\d+)?(:\d+)?$", where or "")
    return place(found[1]) + (found[2] or "") if found and Path(found[1]).is_file() else where


def _stopped(stop: Stopped) -> Finding:
    # "leanplan.yaml:14", "leanplan.lock", "line 14" of the spec, or no place in a file: "command line"
    found = re.fullmatch(r"(?:line (\d+)|(.*?\.\w+)(?::(\d+))?)", stop.where or "")
    path, line = (found[2] or stop.spec_file, int(found[1] or found[3] or 1)) if found else (stop.spec_file, 1)
    return Finding(
        rule="stopped", level="error", title="nothing was judged", path=path, line=line,
        message=literal(f"{stop.message}; {stop.hint}"),
    )  # fmt: skip
