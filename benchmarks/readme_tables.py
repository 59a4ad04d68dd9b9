"""What benchmarks write into README.md: each its own tables, between marks that name them."""

from __future__ import annotations

import re


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
