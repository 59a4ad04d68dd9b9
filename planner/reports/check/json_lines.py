"""One JSON object on each line: every verdict, every metric compared with the lock, and the outcome last."""

from __future__ import annotations

import json

from knowledge_base.serde import plain
from planner.checking import CheckResult, Stopped

CHECK = "one JSON object for each verdict, the outcome last"


def render(check: CheckResult | Stopped) -> str:
    """Return the lines; `kind` says what each is. They are ASCII, so that nothing but a line feed ends a line."""
    lines = []
    if isinstance(check, CheckResult):
        lines += [{"kind": "verdict", **plain(v)} for v in check.verdicts]
        lines += [{"kind": "regression", **plain(r)} for r in check.regressions]
    lines.append({"kind": "check", "headline": check.headline, "exit_code": int(check.exit_code)})
    return "\n".join(json.dumps(line, allow_nan=False) for line in lines)
