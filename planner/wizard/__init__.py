"""`leanplan` alone on a terminal: nine screens that end in a spec, with what is predicted beside each answer."""

from __future__ import annotations

import argparse
import contextlib
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from knowledge_base.errors import ExitCode, Terminated
from planner.cli._talk import clean, emit, say
from planner.forecast import Forecast
from planner.wizard.answers import Answers, forget, keep, kept, recent, remember
from planner.wizard.conversation import Conversation
from planner.wizard.drawing import Face, completions
from planner.wizard.screens import defaults
from planner.wizard.screens._screen import Screen
from planner.wizard.screens.model import is_hub_id, local_models
from planner.wizard.screens.review import as_yaml

WRITING = ("save", "both")  # choices of the last screen that write the file
PROMPT = "> "
WAIT_S = 2.0  # how long a drawn screen waits for its prediction before it asks


def can_ask() -> bool:
    """Return whether a person sits at this terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


def run(options: Any) -> int:
    """Lead a person to a spec, write it, run it, as they wish; return the exit code."""
    store = Path(options.store or ".leanplan")
    models = tuple(dict.fromkeys((*_still_there(recent(store)), *local_models(Path()))))
    forecast = Forecast(store, options.offline, options.trust_remote_code, options.allow_pickle)
    face = Face(colour=options.color)
    answers, screen = _start(store, models, face)
    conversation = Conversation(
        answers, forecast, models, ask=lambda screen: _typed(screen, models, face), show=face.draw,
        idle=_until_ready_or_typed, tell=face.say,
    )  # fmt: skip
    try:
        answers = conversation.lead(screen)
        while not _may_write(answers, options):
            answers = conversation.lead("review")
        _write(answers)
    except (KeyboardInterrupt, EOFError, Terminated) as stop:
        path = keep(store, conversation.answers, conversation.screen)
        say(f"\nstopped; your answers are kept in {path}: leanplan goes on from there")
        return ExitCode.TERMINATED if isinstance(stop, Terminated) else ExitCode.INTERRUPTED
    except OSError:
        keep(store, conversation.answers, conversation.screen)
        raise
    forget(store)
    remember(store, str(answers.spec["model"]["source"]))
    return _finish(answers, options, forecast)


def _start(store: Path, models: tuple[str, ...], face: Face) -> tuple[Answers, str]:
    """Return the answers and screen to start with: those kept, if the person wants to go on with them."""
    if (before := kept(store)) is None:
        return defaults(models), "goal"
    answers, screen = before
    face.say(f"You stopped at `{screen}`, for {answers.spec['model']['source']}.", "bold")
    face.say("Enter goes on from there; n starts afresh.", "cyan")
    try:
        fresh = _line().strip().lower() in ("n", "no")
    except (KeyboardInterrupt, EOFError):
        raise KeyboardInterrupt from None  # nothing new to keep
    return (defaults(models), "goal") if fresh else before


def _still_there(models: tuple[str, ...]) -> list[str]:
    """Return the models that can still be named: folders that are there, and hub ids."""
    return [m for m in models if Path(m).is_dir() or (is_hub_id(m) and not Path(m).parent.is_dir())]


def _line(prompt: str = PROMPT) -> str:
    """Return what was typed; bytes that are no text of this terminal as one that no screen takes."""
    try:
        return input(prompt)
    except UnicodeDecodeError:
        return "\0"


@contextlib.contextmanager
def _redrawn_on_resize(face: Face) -> Iterator[None]:
    """Draw the screen again when the terminal changes its size while a line is typed."""
    import readline

    def redraw(signum: int, frame: object) -> None:
        face.redraw()
        sys.stdout.write(PROMPT + readline.get_line_buffer())
        sys.stdout.flush()

    before = signal.signal(signal.SIGWINCH, redraw)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


def _typed(screen: Screen, models: tuple[str, ...], face: Face) -> str:
    import readline

    def offer(text: str, state: int) -> str | None:
        found = completions(screen, models, text)
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ,\t\n")
    readline.set_completer(offer)
    readline.parse_and_bind("tab: complete")
    readline.set_auto_history(False)
    with _redrawn_on_resize(face):
        return _line()


def _until_ready_or_typed(ready: Callable[[], bool]) -> None:
    """Wait until a prediction is ready, a line was typed, or a moment has passed."""
    stop = time.monotonic() + WAIT_S
    while not ready() and time.monotonic() < stop:
        if select.select([sys.stdin], [], [], 0.02)[0]:
            return


def _may_write(answers: Answers, options: Any) -> bool:
    """Return whether the spec may be written as chosen: never over another file without asking."""
    path = Path(answers.file)
    if answers.then not in WRITING or options.yes or not path.exists():
        return True
    if path.read_text(encoding="utf-8", errors="replace") == as_yaml(answers):
        return True
    return _line(clean(f"overwrite {path}? y/N > ")).strip().lower() in ("y", "yes")


def _write(answers: Answers) -> None:
    """Write the spec, where that was chosen."""
    if answers.then in WRITING:
        from knowledge_base.serde import write_atomic

        write_atomic(Path(answers.file), as_yaml(answers))


def _finish(answers: Answers, options: Any, forecast: Forecast) -> int:
    """Print the spec and the command, or the advice; run the spec, where that was chosen."""
    if answers.then == "advise":
        from planner.advising import advice
        from planner.advising.telling import as_text
        from planner.wizard import training

        outlook = forecast.outlook(answers.parsed)
        found = advice(outlook)
        needs = training.needs(outlook, answers.training) if answers.training else []
        emit(
            options, {"training": needs, "advice": found}, "\n\n".join(filter(None, [as_text(found), "\n".join(needs)]))
        )
        say(
            "\nnext: leanplan alone, goal `serve`, plans and measures within budgets; leanplan init writes a spec to edit"
        )
        return ExitCode.DONE
    import shlex

    emit(options, answers.spec, as_yaml(answers))
    source, rest = (shlex.quote(answers.file), "") if answers.then in WRITING else ("-", " < SPEC")
    say(f"\nwrote {answers.file}" if answers.then in WRITING else "\nnot written to a file")
    say(f"the same without questions: leanplan plan {source}{rest}")
    if answers.then == "save":
        return ExitCode.DONE
    from planner.cli import plan

    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.run_spec(answers.parsed, parser.parse_args([source], namespace=options))
