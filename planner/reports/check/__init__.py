"""One file for each rendering of a check: CHECK says what it is, `render` makes it. A `-` in a name is `_` in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowledge_base.registry import Folder

if TYPE_CHECKING:
    from planner.checking import CheckResult, Stopped

formats = Folder("planner.reports.check", "format", ("CHECK", "render"))


def names() -> tuple[str, ...]:
    """Return the formats as `--format` takes them."""
    return tuple(name.replace("_", "-") for name in formats.names())


def render(name: str, check: CheckResult | Stopped) -> str:
    """Return a check in one of the formats."""
    return str(formats.get(name.replace("-", "_")).render(check))
