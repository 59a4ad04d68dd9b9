"""The licence of a model, as its own files state it."""

from __future__ import annotations

import re
from pathlib import Path

LONGEST_BYTES = 2**16  # of a card or licence that are looked at
UNSAID = "not said in its files"
_KEY = re.compile(r"(license|license_name|licence)\s*:\s*(.+)", re.IGNORECASE)
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def licence(folder: Path) -> str:
    """Return a model's licence: the front matter of its card, else the first line of its licence file, else UNSAID."""
    found = map(_KEY.fullmatch, _front_matter(folder / "README.md"))
    said = {match[1].lower(): match[2].strip(" \"'") for match in found if match}
    if said:
        # `license: other` is followed by the name.
        return said.get("license_name") or said.get("license") or said["licence"]
    for name in _FILES:
        if first := next((line.strip() for line in _head(folder / name).splitlines() if line.strip()), ""):
            return f"{first[:60]} ({name})"
    return UNSAID


def _front_matter(path: Path) -> list[str]:
    """Return the lines between the two rules a model card may start with."""
    lines = [line.strip() for line in _head(path).splitlines()]
    return lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []


def _head(path: Path) -> str:
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return file.read(LONGEST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""  # a file we may not read says nothing
