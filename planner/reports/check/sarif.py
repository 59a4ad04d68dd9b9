"""SARIF 2.1.0: violations on the spec's lines, for code scanning.

Format: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from planner.checking import CheckResult, Stopped
from planner.reports.check._findings import Finding, findings

CHECK = "SARIF 2.1.0, for code scanning"


def render(check: CheckResult | Stopped) -> str:
    """Return the findings as one SARIF run; it counts as successful when something could be judged."""
    found = findings(check)
    rules = [{"id": f.rule, "shortDescription": {"text": f.title}} for f in found]
    run = {
        "tool": {"driver": {"name": "leanplan", "rules": rules}},
        "invocations": [{"executionSuccessful": isinstance(check, CheckResult), "exitCode": int(check.exit_code)}],
        "results": [_result(f, i) for i, f in enumerate(found)],
    }
    log = {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}
    return json.dumps(log, indent=1, ensure_ascii=False)


def _result(finding: Finding, index: int) -> dict[str, Any]:
    # A viewer reads `[text](target)` in a message as a link, and none of ours are.
    text = finding.message.replace("](", "] (")
    place = {"artifactLocation": {"uri": quote(finding.path)}, "region": {"startLine": finding.line}}
    return {
        "ruleId": finding.rule, "ruleIndex": index, "level": finding.level, "message": {"text": text},
        "locations": [{"physicalLocation": place}], "partialFingerprints": {"leanplan/v1": finding.fingerprint},
    }  # fmt: skip
