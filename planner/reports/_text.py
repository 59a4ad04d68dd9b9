"""Foreign text on one line: what a terminal, a log or a parser would obey is shown instead."""

from __future__ import annotations

import re

# C0 and C1 controls, line and paragraph separators, and what turns the direction of text around.
_OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def literal(text: str) -> str:
    r"""Return text without anything that is obeyed rather than shown: ESC becomes the four characters `\x1b`."""
    return _OBEYED.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)
