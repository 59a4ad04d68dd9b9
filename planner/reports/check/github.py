"""Annotations for GitHub Actions: workflow commands that point at the spec's lines, worst first."""

from __future__ import annotations

from planner.checking import CheckResult, Stopped
from planner.reports._text import literal
from planner.reports.check._findings import Finding, findings

CHECK = "annotations on the spec's lines, for GitHub Actions"
MOST = 10  # annotations of one kind that GitHub shows for one step
COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def render(check: CheckResult | Stopped) -> str:
    """Return one workflow command for each finding, at most MOST of a kind, and the headline as plain text."""
    lines = []
    found = findings(check)
    for level, command in COMMANDS.items():
        some = [f for f in found if f.level == level]
        shown = some if len(some) <= MOST else some[: MOST - 1]
        lines += [_command(command, f, f.title, f.message) for f in shown]
        if rest := some[len(shown) :]:
            lines.append(_command(command, rest[0], f"{len(rest)} more", ", ".join(f.title for f in rest)))
    return "\n".join([*lines, f"leanplan: {literal(check.headline)}"])


def _command(command: str, at: Finding, title: str, message: str) -> str:
    properties = {"file": at.path, "line": str(at.line)} if at.path else {}
    written = ",".join(f"{k}={_property(v)}" for k, v in (properties | {"title": f"leanplan: {title}"}).items())
    return f"::{command} {written}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
