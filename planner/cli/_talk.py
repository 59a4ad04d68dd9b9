"""How commands speak: data on stdout, talk on stderr, foreign text never interpreted."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from planner.scrubbing import scrub

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """Return text without control characters and without anything shaped like a credential."""
    return scrub(_CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text.replace("\r\n", "\n")))


def say(text: str, *, quiet: int = 0) -> None:
    """Print one line of talk to stderr, unless quiet."""
    if not quiet:
        _write(sys.stderr, clean(text) + "\n")


def emit(options: Any, value: Any, text: str) -> None:
    """Print a command's data to stdout or --output-file: JSON of `value` with --json, else `text`."""
    from knowledge_base.serde import plain, write_atomic

    if getattr(options, "json", False):
        out = json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False)
    else:
        out = text
    out = scrub(out).rstrip("\n") + "\n"
    if path := getattr(options, "output_file", None):
        if Path(path).exists() and not Path(path).is_file():  # a pipe or device is written to, never replaced
            with Path(path).open("w", encoding="utf-8") as file:
                file.write(out)
        else:
            write_atomic(Path(path), out)
    elif out.strip():
        _write(sys.stdout, out if getattr(options, "json", False) else _CONTROL.sub(_keep_colour(out), out))


def _keep_colour(text: str) -> Any:
    # Text we coloured ourselves carries SGR sequences; every other control character is shown, not obeyed.
    colour = {m.start() for m in re.finditer(r"\x1b\[[0-9;]*m", text)}
    return lambda m: m[0] if m.start() in colour else f"\\x{ord(m[0]):02x}"


def _write(stream: Any, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, errors="replace").decode(encoding))
    stream.flush()


def write_crash_report(error: BaseException) -> Path:
    """Write the traceback of a bug to a temporary file and return its path."""
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="leanplan-bug-", suffix=".txt", delete=False) as file:
        file.write(clean("".join(traceback.format_exception(error)).replace("\n", "\0")).replace("\\x00", "\n"))
        return Path(file.name)
