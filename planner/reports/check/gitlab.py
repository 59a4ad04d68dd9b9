"""GitLab's Code Quality report: the merge request shows each finding at the spec's line.

Format: https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format.
"""

from __future__ import annotations

import json

from planner.checking import CheckResult, Stopped
from planner.reports.check._findings import findings

CHECK = "Code Quality report, for GitLab merge requests"
SEVERITY = {"error": "critical", "warning": "minor", "note": "info"}


def render(check: CheckResult | Stopped) -> str:
    """Return the findings as GitLab's JSON; an empty list when nothing is wrong."""
    issues = [
        {
            "description": f.message, "check_name": f"leanplan/{f.rule}", "fingerprint": f.fingerprint,
            "severity": SEVERITY[f.level], "location": {"path": f.path, "lines": {"begin": f.line}},
        }
        for f in findings(check)
    ]  # fmt: skip
    return json.dumps(issues, indent=1, ensure_ascii=False)
