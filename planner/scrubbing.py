"""Known shapes of credentials, and the last scrub over everything that is written for people."""

from __future__ import annotations

import re

SHAPES = (
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}"
    r"|glpat-[\w-]{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_TEXT, _BYTES = re.compile(SHAPES, re.ASCII), re.compile(SHAPES.encode())


def scrub(text: str) -> str:
    """Return text with hub, cloud and forge tokens and passwords in URLs replaced by `***`."""
    return _TEXT.sub("***", text)


def scrub_bytes(text: bytes) -> bytes:
    """Return the same for bytes of any encoding, such as a candidate's log."""
    return _BYTES.sub(b"***", text)
