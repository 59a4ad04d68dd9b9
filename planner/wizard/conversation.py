"""The conversation: show a screen, read a line, change the answers, until the last screen is accepted.

It needs no terminal: `ask` returns what was typed, `show` is given what there is to see. A person sits behind them, or a
test.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from knowledge_base.errors import BadInput, LeanplanError
from planner.forecast import Forecast, Outlook
from planner.spec import Spec
from planner.wizard.answers import Answers
from planner.wizard.screens import asked, place_of, workload
from planner.wizard.screens._screen import Screen, Tell, View, told

PATIENCE_S = 20.0  # for a prediction that decides whether one may go on
LONGEST_LINE = 1000  # characters of an answer; more was pasted by mistake
GARBAGE = (
    "that is not one line of printable text, so it was not read\ntype one answer, or Enter to accept what is shown"
)


class Show(Protocol):
    def __call__(self, screen: Screen, view: View, *, step: int, steps: int, note: str, turned: int) -> None:
        """Draw a screen. `turned`: how often the person has asked for more of it."""
        ...


class Prediction:
    """An outlook that is being worked out in a thread of its own; the thread never keeps the program from ending."""

    _one_at_a_time = threading.Lock()

    def __init__(self, forecast: Forecast, spec: Spec) -> None:
        self.forecast, self.spec = forecast, spec
        self.outlook: Outlook | None = None
        self.error: LeanplanError | None = None  # why there is no outlook
        self._bug: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            with self._one_at_a_time:
                self.outlook = self.forecast.outlook(self.spec)
        except LeanplanError as error:
            self.error = error
        except BaseException as bug:  # raised again where the person is
            self._bug = bug

    def done(self) -> bool:
        """Return whether there is an outlook, or the reason there is none."""
        if self._bug is not None:
            raise self._bug
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for it, so long at most."""
        self._thread.join(seconds)


class Conversation:
    """Leads through the screens. `answers` and `screen` are what is known when it is left in the middle.

    Args:
        ask: return the typed line; raises EOFError or KeyboardInterrupt when the person leaves.
        show: draw a screen.
        idle: waits for a prediction, as long as that is no nuisance.
        tell: say what a deed is at.
    """

    def __init__(
        self,
        answers: Answers,
        forecast: Forecast,
        models: tuple[str, ...],
        *,
        ask: Callable[[Screen], str],
        show: Show,
        idle: Callable[[Callable[[], bool]], None] = lambda ready: None,
        tell: Tell = lambda text: None,
    ) -> None:
        self.answers, self.forecast, self.models = answers, forecast, models
        self.ask, self.show, self.idle, self.tell = ask, show, idle, tell
        self.screen = "goal"
        self._asked_for: Answers | None = None
        self._coming: Prediction | None = None

    def lead(self, start: str = "goal") -> Answers:
        """Go through the screens from `start` on and return the answers."""
        index = next((i for i, s in enumerate(asked(self.answers)) if s.name == start), 0)
        note, turned = "", 0
        while index < len(screens := asked(self.answers)):
            screen = screens[index]
            self.screen = screen.name
            typed = self._turn(screen, index + 1, len(screens), note, turned)
            if typed == "?":
                turned += 1
                continue
            note, turned = "", 0
            if typed == "":
                note = self._blocked(screen)
                index += not note
            elif typed in ("b", "back"):
                index = max(0, index - 1)
            else:
                note = self._change(screen, typed)
        return self.answers

    def _turn(self, screen: Screen, step: int, steps: int, note: str, turned: int) -> str:
        """Show one screen, again when its prediction has come, and return what was typed."""

        def show() -> None:
            self.show(screen, self._view(), step=step, steps=steps, note=note, turned=turned)

        first = self._coming is None
        if first:
            show()  # before anything heavy is imported: a person waits for this one
        coming = self._predict()
        self.idle(coming.done)
        if coming.error is not None and place_of(coming.error) == "workload" and workload.is_default(self.answers):
            context = self.forecast.model(self.answers.parsed).model.max_context_tokens
            self.answers = workload.within(self.answers, context)
            self.idle(self._predict().done)
        if not first or coming.done():
            show()
        return self.ask(screen).strip()

    def _change(self, screen: Screen, typed: str) -> str:
        """Take a typed line to heart; return what to say of it."""
        if not typed.isprintable() or len(typed) > LONGEST_LINE:
            return GARBAGE
        try:
            if deed := screen.deeds.get(typed):
                said = deed(self.forecast, self.tell)
                self._asked_for = None  # what was predicted before rests on less
                return said
            self.answers = screen.change(self._view(), typed)
        except LeanplanError as error:
            return told(error)
        return ""

    def _blocked(self, screen: Screen) -> str:
        """Return why one cannot go on from a screen, or nothing."""
        if screen.name not in ("model", "machine", "workload"):
            return ""
        coming = self._predict()
        coming.wait(PATIENCE_S)
        error = coming.error
        # Where the hub or the machine stands in the way, not the answer, one may go on.
        return told(error) if isinstance(error, BadInput) and place_of(error) == screen.name else ""

    # ------------------------------------------------------------ what is predicted

    def _predict(self) -> Prediction:
        """Return the prediction for the answers as they are, begun if need be."""
        if self._coming is None or self._asked_for != self.answers:
            self._asked_for, self._coming = self.answers, Prediction(self.forecast, self.answers.parsed)
        return self._coming

    def _view(self) -> View:
        """Return what there is to see: the answers, and what is predicted for them if that is known by now."""
        view = View(answers=self.answers, models=self.models)
        if self._coming is None or self._asked_for != self.answers or not self._coming.done():
            return view
        return replace(view, outlook=self._coming.outlook, problem=self._coming.error)


def wait_for(ready: Callable[[], bool], seconds: float = 3.0) -> None:
    """Wait until something is ready, for a while. The idle of a conversation without a keyboard."""
    pause, left = threading.Event(), seconds
    while not ready() and left > 0:
        pause.wait(0.01)
        left -= 0.01
