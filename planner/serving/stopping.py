"""Stopping a service by signal: the first one drains, the second one does not wait."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from knowledge_base.errors import ExitCode
from planner.serving import Service

CODES = {signal.SIGTERM: ExitCode.TERMINATED, signal.SIGINT: ExitCode.INTERRUPTED}


class Stopping:
    """A context in which SIGTERM and Ctrl-C raise nothing but make `asked` true and `fileno` readable."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.asked = False
        self.code = ExitCode.DONE  # of a stop that cut requests off
        self._reads, self._writes = os.pipe()

    def __enter__(self) -> Stopping:
        self._before: dict[signal.Signals, Any] = {number: signal.signal(number, self._signalled) for number in CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._reads)
        os.close(self._writes)

    def fileno(self) -> int:
        return self._reads

    def ask(self) -> None:
        """Ask for a stop, as a signal does."""
        if self.asked:
            self._service.hurry()
        self.asked = True
        os.write(self._writes, b".")

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self.code = CODES[signal.Signals(number)]
        self.ask()
