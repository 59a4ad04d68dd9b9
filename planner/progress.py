"""Live progress: one live line on a terminal, one plain line for each event in a pipe. Always on stderr."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from planner.cli._talk import clean


class Progress:
    """Tells a person what goes on. Events are printed as lines; `tick` redraws one status line on a terminal.

    Args:
        quiet: no lines at all; `live`: None decides by the terminal.
    """

    def __init__(self, *, quiet: bool = False, live: bool | None = None, limit_s: float | None = None) -> None:
        self.quiet = quiet
        terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.live = (terminal if live is None else live) and not quiet
        self.limit_s = limit_s
        self.start = time.monotonic()
        self._drawn = 0
        self._last_tick = 0.0

    def line(self, text: str) -> None:
        """Print one line that stays."""
        if self.quiet:
            return
        self._erase()
        self._put(f"{self._clock()} {clean(text)}\n")

    def tick(self, text: str) -> None:
        """Redraw the status line, at most ten times a second; nothing in a pipe."""
        if not self.live or time.monotonic() - self._last_tick < 0.1:
            return
        self._last_tick = time.monotonic()
        self._erase()
        width = max(20, _columns()) - 1
        shown = f"{self._clock()} {clean(text)}"[:width]
        self._put(shown)
        self._drawn = len(shown)

    def done(self) -> None:
        """Erase the status line."""
        self._erase()

    def _clock(self) -> str:
        elapsed = time.monotonic() - self.start
        clock = f"{int(elapsed // 60):2d}:{int(elapsed % 60):02d}"
        return f"[{clock}]"

    def _erase(self) -> None:
        if self._drawn:
            self._put("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _put(self, text: str) -> None:
        encoding: Any = getattr(sys.stderr, "encoding", None) or "utf-8"
        try:
            sys.stderr.write(text.encode(encoding, errors="replace").decode(encoding))
            sys.stderr.flush()
        except (BrokenPipeError, ValueError):
            self.quiet = True  # nobody reads; the work goes on


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((80, 24)).columns
