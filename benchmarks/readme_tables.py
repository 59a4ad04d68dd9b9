"""What benchmarks keep: their figures as JSON beside them, and in README.md their own tables, between marks that name them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def figures(results: Path) -> dict[str, Any]:
    """Return the figures of a benchmark's file; none where it is not there."""
    return json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}


def keep_figures(results: Path, found: Mapping[str, Any]) -> None:
    """Write a benchmark's figures into its file."""
    results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def placed(readme: str, name: str, table: str) -> str:
    """Return the text of README.md with a table between its marks; as it was where it has no such marks.

    >>> placed("<!-- x: begin -->old<!-- x: end -->", "x", "new")
    '<!-- x: begin -->\\nnew<!-- x: end -->'
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    return f"{before}{begin}\n{table}{end}{after}" if found and closed else readme


def plain(text: str) -> str:
    """Return other programs' words, names or reasons, without what would mean something in a table."""
    return re.sub(r"[|<>`\[\]\\\x00-\x1f]", " ", text)
